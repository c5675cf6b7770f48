"""Converts weights: `python -m dinov2_jax.convert SOURCE TARGET [--format FORMAT]`.

The source's format is recognised. Prints what it is, what was written and what the target's
format cannot hold. Exit codes: 0 done, 2 wrong input (nothing was written then).
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from dinov2_jax.arguments import Parser
from dinov2_jax.convert.read import read_source
from dinov2_jax.convert.spec import INTERPOLATION_OF, INTERPOLATIONS
from dinov2_jax.convert.state_dict import ConversionError
from dinov2_jax.convert.write import FORMATS, backbone_only, resize_positions, write_source

WRONG_INPUT = 2


def _grid(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    grid = int(rows), int(cols)
    if min(grid) < 1:
        raise ValueError
    return grid


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(
        prog="python -m dinov2_jax.convert",
        description="Converts DINOv2 weights between formats, exactly.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        help=".pth or .safetensors (the reference's, timm's, transformers', ours), a folder of "
        "transformers, a workdir or an Orbax checkpoint",
    )
    parser.add_argument("target", help="a folder for orbax and hf, else a file")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="orbax",
        help="orbax (default); safetensors: the reference's names, our archive; reference: .pth; "
        "hf: a folder for transformers; timm: .safetensors or .pth",
    )
    parser.add_argument(
        "--tree", choices=("teacher", "student"), default="teacher", help="of our checkpoints"
    )
    parser.add_argument("--backbone-only", action="store_true", help="leave the heads out")
    parser.add_argument(
        "--num-heads", type=int, help="default: what the file says, else width / 64"
    )
    parser.add_argument(
        "--interpolation",
        choices=(*INTERPOLATION_OF, *INTERPOLATIONS),
        help="how positions are resized, to be recorded; default: what the file says, else the "
        "reference's",
    )
    parser.add_argument(
        "--pos-embed-grid",
        type=_grid,
        metavar="ROWSxCOLS",
        help="resize the position table, e.g. 16x16; default: as it is",
    )
    parser.add_argument(
        "--block-chunks",
        type=int,
        default=0,
        help="reference: name blocks as its training with this many chunks does",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; what is wrong with its input is on stderr. Returns the exit code."""
    # Arrays pass through host memory; an accelerator, if there is one, is left alone.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        convert(make_parser().parse_args(argv))
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)  # one line for each reason
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    else:
        return 0
    return WRONG_INPUT


def convert(flags: argparse.Namespace) -> None:
    """Reads, writes, and says what happened."""
    if (
        flags.target
        and pathlib.Path(flags.source).resolve() == pathlib.Path(flags.target).resolve()
    ):
        raise ValueError("TARGET must not be SOURCE; choose another")
    source = read_source(
        flags.source,
        tree=flags.tree,
        num_heads=flags.num_heads,
        interpolation=flags.interpolation,
    )
    print(f"{flags.source}: {source.format}\n{source.spec.describe()}")
    print(f"holds {', '.join(sorted(source.params))}")
    for note in source.notes:
        print(f"note: {note}")
    if flags.backbone_only:
        source = backbone_only(source)
    if flags.pos_embed_grid:
        source = resize_positions(source, flags.pos_embed_grid)
        print("note: the position table was resized to {} x {}".format(*flags.pos_embed_grid))
    lost = write_source(
        flags.target,
        source,
        format=flags.format,
        overwrite=flags.overwrite,
        block_chunks=flags.block_chunks,
    )
    target = pathlib.Path(flags.target)
    files = [p for p in target.rglob("*") if p.is_file()] if target.is_dir() else [target]
    size = sum(p.stat().st_size for p in files)
    print(f"wrote {target}: {flags.format}, {size / 1e6:.1f} MB")
    for what in lost:
        print(f"lost: {what}")


if __name__ == "__main__":
    sys.exit(main())
