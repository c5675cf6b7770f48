"""Test sets beside the validation split, on which a trained probe is judged as it is.

Their classes are matched with those of training by name, or by a file; where a set has fewer, the
others cannot be predicted, as in the reference.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from dinov2_jax.data.records import DataError
from dinov2_jax.data.sources import open_source
from dinov2_jax.evals.scores import (
    ALEXNET_ERROR,
    corruption_errors,
    label_set_accuracy,
    top_classes,
    top_k_accuracy,
)
from dinov2_jax.evals.splits import check_labels
from dinov2_jax.features.read import FeatureSet

KINDS = ("images", "label_sets", "corruptions")
LAYOUT = (
    "images (ImageNet-V2, A, R, Sketch): what --data may hold for a split; label_sets (ReaL): a "
    "JSON file, a list of lists of class numbers for the images of the tested split in the order "
    "of their file names, or an object from file name to list; corruptions (ImageNet-C): "
    "CORRUPTION/SEVERITY/CLASS/images"
)
_MCE, _NUM_SEVERITIES = len(ALEXNET_ERROR), 5

Score = Callable[[FeatureSet], np.ndarray]  # features -> logits [rows, training classes]


@dataclasses.dataclass(frozen=True)
class FurtherSet:
    """One of `--test`."""

    name: str
    path: str
    kind: str
    classes: str | None = None  # file of `training_classes`


@dataclasses.dataclass(frozen=True)
class Found:
    """What a set gave: metrics in per cent by name, those of the table, and anything else."""

    metrics: Mapping[str, float]
    headline: Sequence[str]
    counts: Mapping[str, int]
    details: Mapping[str, object] = dataclasses.field(default_factory=dict)


def parse_set(text: str) -> FurtherSet:
    """Reads "NAME=PATH" or "NAME=PATH:KIND".

    Raises:
      ValueError: it is neither.
    """
    name, is_given, path = text.partition("=")
    if not (name and is_given and path) or "/" in name:
        raise ValueError(f"--test {text!r} must be NAME=PATH or NAME=PATH:KIND, KIND of {KINDS}")
    stem, _, kind = path.rpartition(":")
    return FurtherSet(name, stem, kind) if kind in KINDS else FurtherSet(name, path, KINDS[0])


def located(path: str, *, data: str) -> str:
    """Where a path leads: a relative one starts at the data set's folder."""
    is_elsewhere = path.startswith(("hf:", "tfds:", "~")) or "://" in path
    return os.path.expanduser(path if is_elsewhere else os.path.join(data, path))


def parse_sets(sets: Sequence[str], classes: Sequence[str], *, data: str) -> list[FurtherSet]:
    """Reads all of `--test`, and of `--classes NAME=FILE`; their paths are `located`.

    Raises:
      ValueError: see `parse_set`; a name twice, or classes of a set that is not there; or a URL
        where a disk is read.
    """
    found = [parse_set(text) for text in sets]
    files = dict(text.partition("=")[::2] for text in classes)
    names = [each.name for each in found]
    if len(set(names)) < len(names) or not set(files) <= set(names) or "" in files.values():
        raise ValueError(
            f"--test must name each set once, and --classes must be NAME=FILE of one of them; "
            f"{names=}, {classes=}"
        )
    files = {name: located(path, data=data) for name, path in files.items()}
    found = [
        FurtherSet(each.name, located(each.path, data=data), each.kind, files.get(each.name))
        for each in found
    ]
    read = [*files.values(), *(each.path for each in found if each.kind != "images")]
    at_url = [path for path in read if "://" in path]
    if at_url:
        raise ValueError(f"{at_url[0]} must be on a disk: of --test images alone may be at a URL")
    return found


def training_classes(
    names: Sequence[str], *, of: Sequence[str], at: str, file: str | None = None
) -> np.ndarray:
    """The training class of each class of a set, -1 for one that is left out.

    Args:
      names: of the set's classes.
      of: of the training classes.
      at: the set in words.
      file: text, a class of the set a line; behind a tab its training class, by name or by number
        from 0, where it is called otherwise. Classes without a line are left out.

    Raises:
      DataError: a class that training does not have, or two that are one there.
    """
    wanted = {name: name for name in names}
    if file is not None:
        lines = pathlib.Path(file).read_text().splitlines()
        pairs = [line.split("\t") for line in lines if line.strip()]
        wanted = {pair[0].strip(): pair[-1].strip() for pair in pairs}
    number = {str(i): i for i in range(len(of))} | {name: i for i, name in enumerate(of)}
    unknown = [name for name, known in wanted.items() if name in names and known not in number]
    if unknown:
        raise DataError(
            f"classes {unknown[:5]} of {at} are not among the {len(of)} of training; name them "
            "alike, or give a file by --classes NAME=FILE, each line a class, a tab and the "
            "training class"
        )
    found = np.array([number[wanted[name]] if name in wanted else -1 for name in names], np.int64)
    kept = found[found >= 0]
    if len(kept) == 0 or len(np.unique(kept)) < len(kept):
        raise DataError(f"classes of {at} must be one or more, each its own class of training")
    return found


def check_sets(
    sets: Sequence[FurtherSet],
    val: FeatureSet,
    *,
    of: Sequence[str],
    alexnet: Collection[str],
) -> None:
    """Finds what is wrong with sets before a probe is trained.

    Args:
      sets: that it will be judged on.
      val: features of the tested split.
      of: names of the training classes.
      alexnet: corruptions whose error is known.

    Raises:
      DataError: nothing is at a path, or what is there cannot be used.
    """
    for each in sets:
        for path in filter(None, (each.classes, each.kind != "images" and each.path)):
            if not os.path.exists(path):
                raise DataError(f"{each.name}: {path} is not there; expected: {LAYOUT}")
        if each.kind == "label_sets":
            read_label_sets(each.path, val, num_classes=len(of))
        elif each.kind == "corruptions":
            _severities(each.path, alexnet)
        else:
            names = open_source(each.path).label_names
            training_classes(names, of=of, at=each.name, file=each.classes)


def judge_images(
    features: FeatureSet, score: Score, *, of: Sequence[str], at: str, file: str | None
) -> Found:
    """Top-1 and top-5 among the classes that the set has.

    Raises:
      DataError: no labels, or as `training_classes`.
    """
    if features.labels is None:
        raise DataError(f"{at} must have labels: a folder of images for each class")
    check_labels(features.labels, num_classes=len(features.label_names), at=at)
    known = training_classes(features.label_names, of=of, at=at, file=file)
    kept = known >= 0
    rows = np.flatnonzero(kept[features.labels])
    if not len(rows):
        raise DataError(f"{at} has no image of the classes that are kept; see --classes")
    labels = (np.cumsum(kept) - 1)[features.labels[rows]]
    ranked = top_classes(score(features)[rows][:, known[kept]], 5)
    return Found(
        metrics={f"top{k}": 100 * top_k_accuracy(ranked, labels, k) for k in (1, 5)},
        headline=["top1"],
        counts={"images": len(rows), "classes": int(kept.sum())},
    )


def read_label_sets(path: str, features: FeatureSet, *, num_classes: int) -> list[Collection[int]]:
    """Right classes of each row of the tested split's features.

    Args:
      path: see `LAYOUT`.
      features: of the split.
      num_classes: of training.

    Raises:
      DataError: the file is not JSON, of another number of images, or names other classes.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise DataError(f"{path} must be JSON ({error}); expected: {LAYOUT}") from error
    lists = found.values() if isinstance(found, dict) else found
    if not isinstance(lists, Iterable) or not all(map(_is_label_set, lists)):
        raise DataError(f"{path} must hold lists of class numbers; expected: {LAYOUT}")
    files = [os.path.basename(name) for name in features.paths]
    if isinstance(found, list):
        total = features.index["images"]
        if len(found) != total or len(files) != total or len(set(files)) != total:
            raise DataError(
                f"{path} has {len(found)} lists and the tested split {total} images, {len(files)} "
                "of them readable; they must be as many, with different file names; or use an "
                "object from file name to list"
            )
        found = dict(zip(sorted(files), found, strict=True))
    missing = [name for name in files if name not in found]
    if missing:
        raise DataError(f"{path} must have a list, empty or not, for each image; not {missing[:3]}")
    sets = [frozenset(found[name]) for name in files]
    wrong = sorted({label for labels in sets for label in labels} - set(range(num_classes)))
    if wrong:
        raise DataError(f"{path} has classes {wrong[:5]}; they must be numbers below {num_classes}")
    return sets


def judge_label_sets(features: FeatureSet, score: Score, *, path: str, num_classes: int) -> Found:
    """ReaL accuracy: see `scores.label_set_accuracy`."""
    sets = read_label_sets(path, features, num_classes=num_classes)
    share, count = label_set_accuracy(score(features).argmax(axis=1), sets)
    return Found({"top1": 100 * share}, ["top1"], {"images": count})


def judge_corruptions(
    path: str,
    judge: Callable[[str, str], float],
    *,
    alexnet: Mapping[str, float] = ALEXNET_ERROR,
) -> Found:
    """Mean corruption error, in per cent of AlexNet's.

    Named `mce` where all 15 of `ALEXNET_ERROR` are there at five severities, over which AlexNet's
    errors are means, and then of them alone; else `mce_of_N`.

    Args:
      path: a folder, see `LAYOUT`.
      judge: the share wrong of the images at a path, in words.
      alexnet: mean errors of AlexNet; of corruptions beyond the 15 too, if given.

    Raises:
      DataError: the folder has another layout, or a corruption that `alexnet` lacks.
    """
    errors = {
        name: [judge(str(f), f"{name} {f.name}") for f in found]
        for name, found in _severities(path, alexnet).items()
    }
    relative = corruption_errors(errors, alexnet)
    standard = [
        relative[name] for name in ALEXNET_ERROR if len(errors.get(name, ())) == _NUM_SEVERITIES
    ]
    all_of_them = list(relative.values())
    metrics = {f"mce_of_{len(all_of_them)}": 100 * float(np.mean(all_of_them))}
    if len(standard) == _MCE:
        metrics = {"mce": 100 * float(np.mean(standard))} | (
            metrics if len(all_of_them) > _MCE else {}
        )
    return Found(
        metrics=metrics,
        headline=list(metrics)[:1],
        counts={"corruptions": len(all_of_them)},
        details={"corruption_error": relative, "error_by_severity": errors},
    )


def _severities(path: str, alexnet: Collection[str]) -> dict[str, list[pathlib.Path]]:
    """Folders of the severities, by corruption."""
    severities = {}
    for folder in sorted(child for child in pathlib.Path(path).iterdir() if child.is_dir()):
        numbered = [child for child in folder.iterdir() if child.name.isdecimal()]
        severities[folder.name] = sorted(numbered, key=lambda child: int(child.name))
    empty = [name for name, found in severities.items() if not found]
    unknown = [name for name in severities if name not in alexnet]
    if not severities or empty or unknown:
        raise DataError(
            f"{path}: corruptions {empty or unknown or 'none'} "
            + ("have no AlexNet error, see --alexnet-errors" if unknown and not empty else "")
            + f"; expected: {LAYOUT}"
        )
    return severities


def _is_label_set(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(label, int) for label in found)
