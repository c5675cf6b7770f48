"""Labelled videos in the layouts that their data sets have: UCF-101, Kinetics, Something-Something.

A video is a file, or a folder of its frames of the same name without the suffix.
"""

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.video_frames import VIDEO_SUFFIXES

LAYOUT = """one of
  train/CLASS/VIDEO, val/CLASS/VIDEO (or test/)          any videos
  classInd.txt, trainlist01.txt, testlist01.txt (or in ucfTrainTestlist/) and CLASS/v_NAME.avi (or
    in UCF-101/)                                         UCF-101
  train.csv, val.csv (or test.csv) and train/, val/      Kinetics; or lines 'path,class'
  labels.json, train.json, validation.json (or as named when published) and
    20bn-something-something-v2/NUMBER.webm              Something-Something v2
VIDEO is a file (PyAV reads it), or a folder of frames in the order of time"""
_SSV2_VIDEOS = "20bn-something-something-v2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSplit:
    """Videos of one split.

    Attributes:
      paths: of those that are there.
      labels: int32 `[videos]`.
      num_missing: that the list names and that are not there.
    """

    paths: Sequence[str]
    labels: np.ndarray
    num_missing: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSet:
    """Videos to train a probe on, and to test it.

    Attributes:
      kind: "folders", "ucf101", "kinetics" or "ssv2".
      label_names: that labels index.
      train, test: the splits.
    """

    kind: str
    label_names: tuple[str, ...]
    train: VideoSplit
    test: VideoSplit


def open_videos(data: str, *, ucf_split: int = 1) -> VideoSet:
    """Opens whichever layout lies there; see `LAYOUT`.

    Args:
      data: a folder.
      ucf_split: of UCF-101: 1, 2 or 3.

    Raises:
      DataError: none of them, or something of it is wrong.
    """
    root = pathlib.Path(data).expanduser()
    readers = {"ucf101": _ucf101, "kinetics": _kinetics, "ssv2": _ssv2, "folders": _folders}
    for kind, reader in readers.items():
        found = reader(root, ucf_split) if kind == "ucf101" else reader(root)
        if found is not None:
            return _make(kind, data, *found)
    raise DataError(f"{root} holds no videos in a known layout; expected {LAYOUT}")


# A reader gives (path without or with suffix, class name) of train and test, or None.
_Pairs = list[tuple[pathlib.Path, str]]


def _ucf101(root: pathlib.Path, split: int) -> tuple[_Pairs, _Pairs] | None:
    lists = next(
        (x for x in (root / "ucfTrainTestlist", root) if (x / "classInd.txt").exists()), None
    )
    if lists is None:
        return None
    videos = root / "UCF-101" if (root / "UCF-101").is_dir() else root
    parts = []
    for name in ("train", "test"):
        path = lists / f"{name}list{split:02d}.txt"
        names = [line.split()[0] for line in _lines(path)]
        parts.append([(videos / x, x.split("/")[0]) for x in names])
    return parts[0], parts[1]


def _kinetics(root: pathlib.Path) -> tuple[_Pairs, _Pairs] | None:
    if not (root / "train.csv").exists():
        return None
    test = next((x for x in ("val", "validate", "test") if (root / f"{x}.csv").exists()), "val")
    parts = []
    for split in ("train", test):
        rows = list(csv.reader(_lines(root / f"{split}.csv")))
        if rows and "youtube_id" in rows[0]:
            place = {name: i for i, name in enumerate(rows[0])}
            columns = [place.get(x) for x in ("label", "youtube_id", "time_start", "time_end")]
            if None in columns:
                raise DataError(
                    f"{root / split}.csv must have the columns label, youtube_id, time_start and "
                    "time_end"
                )
            clips = ([row[i] for i in columns] for row in rows[1:])
            parts.append(
                [
                    (root / split / f"{name}_{int(start):06d}_{int(end):06d}", label)
                    for label, name, start, end in clips
                ]
            )
        else:
            bad = [row for row in rows if len(row) != 2]
            if bad:
                raise DataError(f"{root / split}.csv must have lines 'path,class', not {bad[0]}")
            parts.append([(root / path, label) for path, label in rows])
    return parts[0], parts[1]


def _ssv2(root: pathlib.Path) -> tuple[_Pairs, _Pairs] | None:
    parts = []
    for split in ("train", "validation"):
        names = (f"{split}.json", f"something-something-v2-{split}.json")
        path = next((root / x for x in names if (root / x).exists()), None)
        if path is None:
            return None
        try:
            clips = json.loads(path.read_text())
            # "Pushing [something]" in the list is "Pushing something" among the labels.
            pairs = [(str(x["id"]), x["template"].replace("[", "").replace("]", "")) for x in clips]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} must be a list of id and template: {error}") from error
        parts.append([(root / _SSV2_VIDEOS / number, label) for number, label in pairs])
    return parts[0], parts[1]


def _folders(root: pathlib.Path) -> tuple[_Pairs, _Pairs] | None:
    test = next((x for x in ("val", "validation", "test") if (root / x).is_dir()), None)
    if test is None or not (root / "train").is_dir():
        return None
    parts = []
    for split in ("train", test):
        classes = sorted(x for x in (root / split).iterdir() if x.is_dir())
        videos = ((x, c.name) for c in classes for x in sorted(c.iterdir()))
        parts.append([(x, label) for x, label in videos if _is_video(x)])
    return parts[0], parts[1]


def _make(kind: str, data: str, train: _Pairs, test: _Pairs) -> VideoSet:
    label_names = tuple(sorted({label for _, label in train}))
    unknown = sorted({label for _, label in test} - set(label_names))
    if unknown:
        raise DataError(
            f"{data}: classes {unknown[:3]} of the test split are not in the training one"
        )
    number = {name: i for i, name in enumerate(label_names)}
    splits = {}
    for name, pairs in (("train", train), ("test", test)):
        found = [(_find(path), number[label]) for path, label in pairs]
        there = [(path, label) for path, label in found if path is not None]
        if len({label for _, label in there}) < 2:
            example = pairs[0][0] if pairs else "none named"
            raise DataError(
                f"{data}: of {len(pairs)} videos of the {name} split {len(there)} are there; two of"
                f" different classes are needed (looked for {example}); expected {LAYOUT}"
            )
        splits[name] = VideoSplit(
            paths=[path for path, _ in there],
            labels=np.array([label for _, label in there], np.int32),
            num_missing=len(pairs) - len(there),
        )
    return VideoSet(kind=kind, label_names=label_names, **splits)


def _find(path: pathlib.Path) -> str | None:
    """A video as it is named, or by its stem: a folder of frames, or a file of another kind."""
    stem = path.with_suffix("") if path.suffix.lower() in VIDEO_SUFFIXES else path
    candidates: Iterable[pathlib.Path] = (path, stem, *(_with(stem, x) for x in VIDEO_SUFFIXES))
    return next((os.fspath(x) for x in candidates if x.exists()), None)


def _with(stem: pathlib.Path, suffix: str) -> pathlib.Path:
    return stem.parent / f"{stem.name}{suffix}"


def _is_video(path: pathlib.Path) -> bool:
    if path.name.startswith("."):
        return False
    return path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{path} is not there; expected {LAYOUT}") from None
