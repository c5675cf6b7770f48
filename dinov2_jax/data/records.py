"""What every source is: a sequence of records, and a sentence about itself. Numpy only.

A source is opened once, pickled into the worker processes, and read there by several threads; it
holds no open file when it is pickled. `sources.open_source` is the door.
"""

import collections
from typing import NamedTuple

import numpy as np


class DataError(ValueError):
    """The data cannot be used as asked; the message names the value, the rule and the cure."""


class BadImage(ValueError):
    """One image cannot be used; the message is the reason, in a few words."""


class Record(NamedTuple):
    """One image as it is stored."""

    image: bytes | np.ndarray  # encoded, or [h, w], [h, w, c] of uint8, uint16, bool or float
    name: str  # what a person finds it by
    label: int | None  # index into the source's `label_names`; for evaluation only


class Source:
    """A sequence of records with random access. Subclasses read one kind of storage.

    Attributes:
      path: what was opened, as it was written.
      kind: of storage, in words.
      label_names: class names that labels index; () without labels.
      rejected: (name, reason) of what looked like an image and was refused at the scan.
      num_other_files: files passed over because nothing says that they are images.
    """

    path: str
    kind: str
    label_names: tuple[str, ...] = ()
    rejected: list[tuple[str, str]]
    num_other_files: int = 0

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} must define __len__")

    def __getitem__(self, index: int) -> Record:
        """Record `index` in [0, len). Raises BadImage where it cannot be read at all."""
        raise TypeError(f"{type(self).__name__} must define __getitem__")

    def name(self, index: int) -> str:
        """Name of record `index`, also where its image cannot be read."""
        return self[index].name

    def describe(self) -> str:
        """One line: what was found, from where, and what was rejected."""
        labels = f" in {len(self.label_names)} classes" if self.label_names else ""
        line = f"{len(self):,} images{labels} from {self.kind} {self.path}"
        if self.rejected:
            line += f"; rejected {len(self.rejected)}: {count_reasons(self.rejected)}"
        if self.num_other_files:
            line += f"; passed over {self.num_other_files:,} other files"
        return line


def count_reasons(rejected: list[tuple[str, str]]) -> str:
    """'2 zero bytes, 1 missing', commonest first."""
    counts = collections.Counter(reason for _, reason in rejected)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def too_many_bad(count: int, num_images: int, max_fraction: float) -> bool:
    """Whether so many bad images must stop the work; a single one only where none is allowed."""
    return count > (max(max_fraction * num_images, 1) if max_fraction else 0)


def require_images(source: Source, *, cure: str) -> Source:
    """Returns the source. Raises DataError, naming what was rejected, if it holds no image."""
    if len(source):
        return source
    if source.rejected:
        name, reason = source.rejected[0]
        raise DataError(
            f"no usable image in {source.kind} {source.path}: all {len(source.rejected)} "
            f"candidates were rejected ({count_reasons(source.rejected)}); "
            f"the first is {name}: {reason}; {cure}"
        )
    raise DataError(
        f"no image in {source.kind} {source.path} "
        f"({source.num_other_files} files of other kinds); {cure}"
    )


class Strings:
    """Many strings in two arrays: small in memory, and quick to send to worker processes."""

    def __init__(self, strings: list[str]):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index], self._ends[index + 1]
        return self._bytes[start:end].tobytes().decode("utf-8", "surrogateescape")


def folder_labels(
    folders: list[str], folder_of: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Classes from folders: the first folder below those that all images share.

    Args:
      folders: distinct relative folders, parts joined by "/"; "" is the root.
      folder_of: int [n], each image's index into `folders`.

    Returns:
      Sorted class names and int32 [n] labels; ((), None) where some image lies in no class folder.
    """
    used = np.unique(folder_of)
    parts = {int(i): folders[i].split("/") if folders[i] else [] for i in used}
    while parts and all(len(p) > 1 and p[0] == parts[int(used[0])][0] for p in parts.values()):
        parts = {i: p[1:] for i, p in parts.items()}
    if not parts or not all(parts.values()):
        return (), None
    names = tuple(sorted({p[0] for p in parts.values()}))
    label_of_name = {name: label for label, name in enumerate(names)}
    label_of_folder = np.full(len(folders), -1, np.int32)
    for i, p in parts.items():
        label_of_folder[i] = label_of_name[p[0]]
    return names, label_of_folder[folder_of]
