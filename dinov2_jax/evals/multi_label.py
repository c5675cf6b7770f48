"""Images with several classes each: JSON lists beside the images, or VOC 2007 as published."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dinov2_jax.data.folder import open_files
from dinov2_jax.data.records import DataError, Source
from dinov2_jax.evals.task import require_classes
from dinov2_jax.features.read import FeatureSet

LAYOUT = (
    "for several classes an image: train.json and test.json (and val.json), each an object from "
    "the image's path, relative to --data, to a list of classes, '?CLASS' for one that does not "
    "count; or JPEGImages/ and ImageSets/Main/CLASS_SPLIT.txt as in VOC2007"
)
_VOC_LISTS = pathlib.Path("ImageSets", "Main")
_UNSURE = "?"


class MultiLabels(NamedTuple):
    """What a split says of its images."""

    at: str
    paths: list[str]
    names: tuple[str, ...]  # of the classes, sorted
    targets: np.ndarray  # int8 [images, classes]: 1, 0, -1 does not count

    def source(self) -> Source:
        """The images."""
        return open_files(self.at, self.paths)

    def rows(self, features: FeatureSet, *, names: Sequence[str]) -> np.ndarray:
        """Targets `[rows, classes]` of features, their columns in the order of `names`.

        Raises:
          DataError: a class is not among `names`.
        """
        number = {name: i for i, name in enumerate(names)}
        unknown = [name for name in self.names if name not in number]
        if unknown:
            raise DataError(f"classes {unknown[:5]} of {self.at} are not among those of train")
        of_path = {os.path.normpath(path): i for i, path in enumerate(self.paths)}
        found = self.targets[[of_path[os.path.normpath(path)] for path in features.paths]]
        wide = np.zeros((len(found), len(names)), np.int8)
        wide[:, [number[name] for name in self.names]] = found
        return wide


def check_targets(targets: np.ndarray, *, names: Sequence[str], at: str) -> None:
    """Checks that every class can be learnt from the images `[images, classes]` of a split.

    Raises:
      DataError: there are fewer than two classes, or one that all images have or none.
    """
    require_classes(len(names), at=at, layout=LAYOUT)
    is_one_sided = ~((targets == 1).any(axis=0) & (targets == 0).any(axis=0))
    if is_one_sided.any():
        found = [name for name, is_so in zip(names, is_one_sided, strict=True) if is_so]
        raise DataError(
            f"{at}: each class must be on some images and not on others, and {found[:5]} are not; "
            "add images, or leave the class out"
        )


def is_multi_label(data: str) -> bool:
    """Whether a folder is laid out as `LAYOUT`."""
    root = pathlib.Path(data).expanduser()
    return (root / "train.json").is_file() or (root / _VOC_LISTS).is_dir()


def read_multi_labels(data: str, splits: Sequence[str]) -> MultiLabels | None:
    """The first of the splits that is there; None where none is.

    Raises:
      DataError: its file is not as `LAYOUT`.
    """
    root = pathlib.Path(data).expanduser()
    for split in splits:
        if (root / f"{split}.json").is_file():
            return _read_json(root, root / f"{split}.json")
        lists = sorted((root / _VOC_LISTS).glob(f"*_{split}.txt"))
        if lists:
            return _read_voc(root, split, lists)
    return None


def _read_json(root: pathlib.Path, path: pathlib.Path) -> MultiLabels:
    try:
        found = json.loads(path.read_text())
        if not all(isinstance(names, list) for names in found.values()):
            raise TypeError("the classes of an image must be a list")
        classes = {image: [str(name) for name in names] for image, names in found.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} cannot be used ({error}); expected: {LAYOUT}") from error
    names = sorted({name.removeprefix(_UNSURE) for each in classes.values() for name in each})
    number = {name: i for i, name in enumerate(names)}
    targets = np.zeros((len(classes), len(names)), np.int8)
    for row, each in enumerate(classes.values()):
        for name in each:
            is_unsure = name.startswith(_UNSURE)
            targets[row, number[name.removeprefix(_UNSURE)]] = -1 if is_unsure else 1
    paths = [str(root / image) for image in classes]
    return MultiLabels(str(path), paths, tuple(names), targets)


def _read_voc(root: pathlib.Path, split: str, lists: Sequence[pathlib.Path]) -> MultiLabels:
    """VOC says 1, -1, and 0 for objects that are difficult, which do not count."""
    names = tuple(path.name.removesuffix(f"_{split}.txt") for path in lists)
    says = {}
    for column, path in enumerate(lists):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fields = line.split()
            if len(fields) != 2 or fields[1] not in ("1", "-1", "0"):
                raise DataError(f"{path}:{number}: {line!r} must be an image and 1, -1 or 0")
            row = says.setdefault(fields[0], np.zeros(len(names), np.int8))
            row[column] = {"1": 1, "-1": 0, "0": -1}[fields[1]]
    paths = [str(root / "JPEGImages" / f"{image}.jpg") for image in says]
    at = str(root / _VOC_LISTS / f"*_{split}.txt")
    return MultiLabels(at, paths, names, np.stack(list(says.values())))
