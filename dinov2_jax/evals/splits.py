"""Splits of a labelled data set: `train`, `val` and `test` beside each other, in any storage."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov2_jax.arguments import positive
from dinov2_jax.data.files import DISK, Store
from dinov2_jax.data.records import DataError, Source
from dinov2_jax.data.sources import open_source

LAYOUT = (
    "a folder with train/ and val/ (or test/), each with a folder of images per class; or "
    "train.tar, train-*.tar, train.txt or train.array_record* and so on, "
    "also at a URL such as gs://bucket/folder; or hf:NAME, tfds:NAME"
)
_PATTERNS = ("{}", "{}.tar", "{}-*.tar", "{}_*.tar", "{}.txt", "{}.array_record*")


def find_split(data: str, names: Sequence[str], *, default: str | None = None) -> str:
    """Where the first of `names` that exists lies: what `data.sources.open_source` takes.

    Args:
      data: see `LAYOUT`.
      names: of the split.
      default: returned where none of them is there; None: that is an error.

    Raises:
      DataError: none of them is there, or the store cannot be read.
    """
    if data.startswith(("hf:", "tfds:")):
        return f"{data}:{names[0]}"
    data = os.path.expanduser(data)
    files = Store(data) if "://" in data else DISK
    try:
        for name in names:
            for pattern in _PATTERNS:
                path = os.path.join(data, pattern.format(name))
                if files.glob(path) if "*" in path else files.is_there(path):
                    return path
    except OSError as error:
        raise DataError(f"{data} cannot be read ({error.strerror}); check its access") from error
    if default is None:
        raise DataError(f"{data} holds no split {' or '.join(names)}; expected: {LAYOUT}")
    return default


def open_split(data: str, names: Sequence[str]) -> Source:
    """Opens the first of `names` that exists.

    Raises:
      DataError: none of them is there, or it cannot be used.
    """
    if not data.startswith(("hf:", "tfds:")):
        return open_source(find_split(data, names))
    reasons = []
    for name in names:
        try:
            return open_source(f"{data}:{name}")
        except DataError as error:
            reasons.append(error)
    raise reasons[0]


def check_labels(labels: np.ndarray, *, num_classes: int, at: str) -> None:
    """Checks that every label is one: public test splits often have -1 for all that is secret.

    Raises:
      DataError: one is not in [0, num_classes).
    """
    is_bad = ~((labels >= 0) & (labels < num_classes))
    if is_bad.any():
        raise DataError(
            f"{is_bad.sum():,} of {len(labels):,} labels of {at} are none, such as "
            f"{labels[is_bad][0]}; they must be numbers from 0 to {num_classes - 1}: choose a "
            "split whose labels are public, see --split"
        )


def labels_like(
    labels: np.ndarray, *, label_names: Sequence[str], of: Sequence[str], at: str
) -> np.ndarray:
    """Labels of one split in the numbering of another: classes are matched by name.

    Args:
      labels: integers `[rows]`, indices into `label_names`.
      label_names: of the split.
      of: class names of the other.
      at: the split in words.

    Raises:
      DataError: a class of the split is not among those of the other.
    """
    number = {name: i for i, name in enumerate(of)}
    unknown = [name for name in label_names if name not in number]
    if unknown:
        raise DataError(
            f"classes {unknown[:5]} of {at} are not among the {len(of)} of the training split; "
            "both must have the same class names"
        )
    return np.array([number[name] for name in label_names], np.int32)[labels]


def add_crop_flags(
    parser: argparse.ArgumentParser,
    *,
    split: str = "val or validation, or test where there is neither",
    resize: str = "the model's (256)",
) -> None:
    """Flags of tasks on whole images: which split is tested, and the size of its images.

    Args:
      parser: they are added to.
      split, resize: the task's defaults in words.
    """
    parser.add_argument("--split", metavar="NAME", help=f"tested; default: {split}")
    add_size_flags(parser, resize=resize)


def add_size_flags(parser: argparse.ArgumentParser, *, resize: str = "the model's (256)") -> None:
    """The size of whole images; `crop_sizes` reads it."""
    add = parser.add_argument
    add("--resize", type=positive, metavar="PX", help=f"short side; default: {resize}")
    add("--crop", type=positive, metavar="PX", help="centred crop; default: the model's (224)")


def crop_sizes(flags: argparse.Namespace) -> dict[str, int | None]:
    """Of `add_size_flags`, as `Run.features` takes them."""
    return {"resize_size_px": flags.resize, "crop_size_px": flags.crop}


def tested(flags: argparse.Namespace) -> tuple[str, ...]:
    """Names of the split that `add_crop_flags` asks for, the preferred first."""
    return (flags.split,) if flags.split else ("val", "validation", "test")


def image_sizes(index: Mapping[str, Any]) -> dict[str, int | None]:
    """What size the images had, for the record; `index` is that of their features."""
    return {key: index[key] for key in ("resize_size_px", "crop_size_px")}
