"""Images and their targets (masks, depth maps), file by file: finding and reading them. Numpy only.

Targets are read as they are stored: indices of a palette and 16-bit numbers are not converted.
"""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinov2_jax.data.image_ops import IMAGE_SUFFIXES, decode
from dinov2_jax.data.records import BadImage, DataError


class Pair(NamedTuple):
    """An image and its target."""

    image: pathlib.Path
    target: pathlib.Path

    @property
    def name(self) -> str:
        """What a person finds it by."""
        return self.image.stem


def folder_pairs(
    images: pathlib.Path,
    targets: pathlib.Path,
    *,
    layout: str,
    image_end: str = "",
    target_end: str = "",
) -> list[Pair]:
    """Pairs of two folders, at any depth, by their paths without the endings; sorted.

    Args:
      images, targets: the folders.
      layout: for errors.
      image_end, target_end: what follows the common part of a name, before its suffix.

    Raises:
      DataError: a folder is missing or empty, or an image or target has no partner.
    """
    found = _by_key(images, image_end, layout), _by_key(targets, target_end, layout)
    alone = [
        f"{folder / key}{end}"
        for folder, end, here, there in (
            (images, image_end, *found),
            (targets, target_end, *reversed(found)),
        )
        for key in sorted(here.keys() - there.keys())
    ]
    if alone:
        raise DataError(
            f"{len(alone)} files have no partner of the same name in the other folder, such as "
            f"{', '.join(alone[:3])}; expected: {layout}"
        )
    return [Pair(found[0][key], found[1][key]) for key in sorted(found[0])]


def listed_pairs(
    root: pathlib.Path, names: Iterable[tuple[str, str]], *, layout: str
) -> list[Pair]:
    """Pairs of (image, target) names below a folder, in their order.

    Raises:
      DataError: there is none, or a file is missing.
    """
    pairs = [Pair(root / image.lstrip("/"), root / target.lstrip("/")) for image, target in names]
    missing = [str(path) for pair in pairs for path in pair if not path.is_file()]
    if missing or not pairs:
        what = f"{len(missing)} listed files are missing" if pairs else f"{root}: no pair is listed"
        examples = f", such as {', '.join(missing[:3])}" if missing else ""
        raise DataError(f"{what}{examples}; expected: {layout}")
    return pairs


def first_folder(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    """The first of the folders that is there."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def read_image(path: pathlib.Path) -> np.ndarray:
    """An image, uint8 `[height, width, 3]`.

    Raises:
      DataError: it cannot be read.
    """
    try:
        return decode(path.read_bytes())
    except BadImage as error:
        raise DataError(f"{path} cannot be used: {error}; repair it") from error


def read_target(path: pathlib.Path) -> np.ndarray:
    """The numbers of a mask or a depth map as they are stored, int32 `[height, width]`.

    Raises:
      DataError: it cannot be read, or has colours.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise DataError(
                    f"{path} holds {opened.mode} pixels, and must hold one whole number each: a "
                    "class, or a depth in units; convert it"
                )
            return np.array(opened).astype(np.int32)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be used: {error}; repair it") from error


def read_pair(
    pair: Pair, read: Callable[[pathlib.Path], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its target, `read` from the file.

    Raises:
      DataError: one cannot be read, or their sizes differ.
    """
    image, target = read_image(pair.image), read(pair.target)
    if image.shape[:2] != target.shape:
        sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (image, target)]
        raise DataError(
            f"{pair.image} has {sizes[0]} pixels and {pair.target} {sizes[1]}; every pixel of an "
            "image must have one of its target: resize the target, without interpolation"
        )
    return image, target


def _by_key(folder: pathlib.Path, end: str, layout: str) -> dict[str, pathlib.Path]:
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        stem = path.stem
        if path.suffix.lower() in IMAGE_SUFFIXES and stem.endswith(end) and path.name[0] != ".":
            key = path.relative_to(folder).with_name(stem.removesuffix(end)).as_posix()
            if key in found:
                raise DataError(f"{found[key]} and {path} have one name; remove one of them")
            found[key] = path
    if not found:
        raise DataError(f"{folder} holds no image{f' *{end}.*' * bool(end)}; expected: {layout}")
    return found
