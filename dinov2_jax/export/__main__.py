"""Exports a model: `python -m dinov2_jax.export SOURCE TARGET [--format FORMAT] [--size SIZE]`.

Prints what was written and by how much it differs from its source. Exit codes: 0 done, 1 it
differs by too much, 2 wrong input; nothing is written in either.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from dinov2_jax.arguments import Parser
from dinov2_jax.convert.spec import INTERPOLATION_OF, INTERPOLATIONS
from dinov2_jax.export.check import BATCHES, BOUND, ExportError, describe
from dinov2_jax.export.write import FORMATS, export_model

WRONG_RESULT, WRONG_INPUT = 1, 2


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(
        prog="python -m dinov2_jax.export",
        description="Exports a DINOv2 backbone for other runtimes, and checks what it wrote.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="whatever dinov2_jax.load takes: a name, file or folder")
    parser.add_argument("target", help="a file; its suffix may tell the format")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="stablehlo: by jax.export, for CPU, CUDA and TPU; onnx: needs the extra `export`; "
        "safetensors: the archive, as dinov2_jax.convert writes it",
    )
    parser.add_argument(
        "--size",
        type=_size,
        metavar="PX or HEIGHTxWIDTH",
        help="of the images; default: the model's crop, 224 for the released ones",
    )
    parser.add_argument(
        "--tree", choices=("teacher", "student"), default="teacher", help="of our checkpoints"
    )
    parser.add_argument(
        "--num-heads", type=int, help="default: what the file says, else width / 64"
    )
    parser.add_argument(
        "--interpolation",
        choices=(*INTERPOLATION_OF, *INTERPOLATIONS),
        help="how positions are resized; default: what the file says, else the reference's",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; what is wrong is on stderr, in one line. Returns the exit code."""
    try:
        flags = make_parser().parse_args(argv)
        differences = export_model(**vars(flags))
    except ExportError as error:
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return WRONG_RESULT
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    target = pathlib.Path(flags.target)
    print(f"wrote {target}: {target.stat().st_size / 1e6:.1f} MB")
    print(
        f"largest difference from {flags.source} in batches of {BATCHES[0]} and {BATCHES[1]}, over "
        f"the largest value: {describe(differences)} (bound {BOUND:.0e})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
