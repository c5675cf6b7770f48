"""Writes features of images: `python -m dinov2_jax.features IMAGES OUT --model MODEL [--what ..]`.

The same command again goes on where it was interrupted. Exit codes: 0 done, 1 the disk is full,
2 wrong input, 130 interrupted (Ctrl-C).
"""

import argparse
import signal
import sys
from collections.abc import Sequence

import jax

from dinov2_jax import distributed
from dinov2_jax.arguments import Parser
from dinov2_jax.commands import run_command
from dinov2_jax.features.extract import extract
from dinov2_jax.features.outputs import DTYPES
from dinov2_jax.model import load

_LONGEST_RUN_SECS = 30 * 24 * 3600


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(
        prog="python -m dinov2_jax.features",
        description="Writes features of images; the same command again goes on where it was.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "images",
        help="a folder, a .txt list, 'shards/*.tar', 'x.array_record*', hf:name:split, "
        "tfds:name:split or photos:",
    )
    add("out", help="a folder; or, for a small set, a .npz or .safetensors file")
    add("--model", required=True, help="a file, a folder, a workdir, or a name: dinov2_vits14")
    add(
        "--what",
        default="cls",
        help="joined by commas: cls, mean (of the patches), patches, registers; layers=4: CLS and "
        "mean of the last four blocks, layers=2+5+8+11: of these, layers=8+: of block 8 (counted "
        "from 0); layers_patches=..: their patches. Default: cls",
    )
    add("--dtype", choices=tuple(DTYPES), default="float32", help="on disk (default float32)")
    add(
        "--no-norm",
        action="store_true",
        help="take layers before the final normalisation, as the released depth heads do",
    )
    add("--resize", type=int, metavar="PX", help="short side; default: the model's (256)")
    add("--crop", type=int, metavar="PX", help="side of the centred crop; default: the model's")
    add("--no-crop", action="store_true", help="whole images; all must end up in one size")
    add("--batch-size", type=int, default=32, help="images at once on each device (default 32)")
    add("--threads", type=int, help="that decode; default: one a core, at most 16")
    add("--shard-size", type=int, default=512, help="images a shard (default 512)")
    add(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        help="stop if more images than this share, and more than one, are bad (default 0.01)",
    )
    add(
        "--distributed",
        choices=distributed.MODES,
        default="auto",
        help="whether others share the work (and OUT), as in train: auto (default) looks for Cloud "
        "TPU, SLURM, OpenMPI, Kubernetes and JAX_COORDINATOR_ADDRESS; on must find one; off never "
        "looks",
    )
    add("--process-index", type=int, help="instead: this one of several processes, from 0")
    add("--process-count", type=int, help="and how many there are; these do not meet")
    add("--compute-dtype", choices=tuple(DTYPES), default="float32", help="default: float32")
    add("--tree", choices=("teacher", "student"), default="teacher", help="of our checkpoints")
    add("--interpolation", help="reference, huggingface or timm; default: what the file says")
    add("--num-heads", type=int, help="default: what the file says, else width / 64")
    add(
        "--attention",
        choices=("xla", "by_head", "cudnn"),
        help="default: by_head on one CPU device, else xla",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; what is wrong is one line on stderr. Returns the exit code."""
    return run_command(lambda: run(make_parser().parse_args(argv)))


def run(flags: argparse.Namespace) -> int:
    """Loads, extracts, and says what came of it. Returns 0."""
    if flags.process_index is None and flags.process_count is None:
        distributed.initialize(flags.distributed)
        if jax.process_count() > 1:  # jax has taken SIGTERM over, for runs that save first
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    elif flags.distributed == "on":
        raise ValueError("--distributed=on finds the processes itself; leave --process-.. out")
    model = load(
        flags.model,
        tree=flags.tree,
        dtype=flags.compute_dtype,
        interpolation=flags.interpolation,
        num_heads=flags.num_heads,
        attention=flags.attention,
    )
    report = extract(
        model,
        flags.images,
        flags.out,
        what=flags.what,
        dtype=flags.dtype,
        norm=not flags.no_norm,
        resize_size_px=flags.resize,
        crop_size_px=flags.crop,
        crop=not flags.no_crop,
        per_device_batch_size=flags.batch_size,
        num_threads=flags.threads,
        shard_size=flags.shard_size,
        max_bad_fraction=flags.max_bad_fraction,
        process_index=flags.process_index,
        process_count=flags.process_count,
        quiet=not distributed.is_primary(),
    )
    distributed.meet(secs=_LONGEST_RUN_SECS)  # whoever leaves first would end the others
    if report.images:
        print(
            f"{report.images:,} images, {len(report.bad)} of them bad; {report.images_per_sec:.4g} "
            f"images/s, {report.data_wait_share:.0%} of the time waiting for data"
        )
    if report.is_complete:
        print(f"{flags.out} is complete; dinov2_jax.features.read opens it")
    else:
        print(f"{flags.out}: this process is done; others have shards to write")
    return 0


if __name__ == "__main__":
    sys.exit(main())
