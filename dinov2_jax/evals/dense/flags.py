"""Flags that segmentation and depth share: which head, how it is trained, how many pictures."""

import argparse
import hashlib
import os
import pathlib

from dinov2_jax.arguments import count, positive, positive_number


class HeadFile:
    """A flag's file; in a result's request it stands for what it holds, not for its place.

    It is read when it is needed: an earlier entry of a suite may write it.
    """

    def __init__(self, path: str):
        self.path = pathlib.Path(path).expanduser()

    def __str__(self) -> str:
        """Raises OSError where it cannot be read."""
        return f"sha256 {hashlib.sha256(self.path.read_bytes()).hexdigest()}"


def add_head_flags(parser: argparse.ArgumentParser, *, iterations: int) -> None:
    """Adds them; `iterations` are the paper's."""
    add = parser.add_argument
    add(
        "--head",
        type=HeadFile,
        metavar="FILE",
        help="test this head and train none: a released .pth, or a head.safetensors of ours",
    )
    add(
        "--iterations",
        type=positive,
        default=iterations,
        metavar="N",
        help=f"steps of training (default {iterations}, as in the paper)",
    )
    add("--images-per-step", type=positive, default=16, metavar="N", help="default 16")
    add(
        "--learning-rate",
        type=positive_number,
        metavar="X",
        help="its peak; default: the protocol's",
    )
    add("--weight-decay", type=float, metavar="X", help="default: the protocol's")
    add(
        "--warmup",
        type=count,
        metavar="N",
        help="steps; default: the share of all steps that the protocol has",
    )
    add(
        "--cached",
        action="store_true",
        help="train on the centred crop of each image alone, its features computed once: fast, "
        "without augmentation",
    )
    add(
        "--save-steps",
        type=positive,
        default=500,
        metavar="N",
        help="steps between two savings of what an interrupted training goes on from",
    )
    add("--pth", action="store_true", help="also write head.pth, as released (needs PyTorch)")
    add(
        "--charts",
        type=count,
        default=8,
        metavar="N",
        help="examples on the sheet predictions.png (default 8; 0: no sheet)",
    )


def warmup_steps(flags: argparse.Namespace, *, share: float) -> int:
    """The steps of the warm-up: those asked for, or a share of all."""
    return round(share * flags.iterations) if flags.warmup is None else flags.warmup


def num_threads(flags: argparse.Namespace) -> int:
    """Threads that decode."""
    return flags.threads or min(os.cpu_count() or 1, 16)
