"""Image files in a folder, named by a list, or by themselves. Numpy only.

A folder needs no index: every file in it, at any depth, is looked at once; in an object store, only
its name is. Class folders are labels. The order is that of the sorted paths, whatever the file
system returns.
"""

import concurrent.futures
import io
import os

import numpy as np

from dinov2_jax.data.files import DISK, Disk, Entry, Store
from dinov2_jax.data.image_ops import IMAGE_SUFFIXES, NUM_SNIFFED_BYTES, image_format
from dinov2_jax.data.records import (
    BadImage,
    DataError,
    Record,
    Source,
    Strings,
    folder_labels,
    require_images,
)
from dinov2_jax.faults import refusal

_NUM_FOLDERS_AT_A_TIME = 16


class FileSource(Source):
    """Image files, opened one by one as they are read."""

    def __init__(
        self,
        *,
        path: str,
        kind: str,
        files: Disk | Store,
        root: str,
        found: "_Found",
        labels: list[str] | None = None,
    ):
        """Takes over what a scan has found.

        Args:
          path, kind: for messages.
          files: where they are.
          root: folder the found paths are relative to.
          found: the scan's result.
          labels: class name of each image; None: from the class folders.
        """
        self.path, self.kind, self.rejected = path, kind, found.rejected
        self.num_other_files = found.num_other_files
        self._root, self._files = root, files
        self._folders = found.folders
        self._folder_of = np.asarray(found.folder_of, np.int32)
        self._file_names = Strings(found.file_names)
        if labels is None:
            self.label_names, self._labels = folder_labels(found.folders, self._folder_of)
        else:
            names, inverse = np.unique(np.asarray(labels), return_inverse=True)
            self.label_names, self._labels = tuple(names.tolist()), inverse.astype(np.int32)

    def __len__(self) -> int:
        return len(self._folder_of)

    def __getitem__(self, index: int) -> Record:
        name = self.name(index)
        try:
            image = self._files.read(name)
        except OSError as error:
            raise BadImage(error.strerror or "unreadable") from error
        label = None if self._labels is None else int(self._labels[index])
        return Record(image, name, label)

    def name(self, index: int) -> str:
        folder = self._folders[self._folder_of[index]]
        return os.path.join(self._root, folder, self._file_names[index])


def open_folder(path: str, files: Disk | Store = DISK) -> Source:
    """Opens all images below a folder.

    Symbolic links are followed, but for those that lead back into a folder they lie in; hidden
    files and folders (a leading dot) are left out. A file whose suffix or content says that it is
    an image is one, or is rejected; all others are only counted. In a store the suffix decides.

    Raises:
      DataError: no usable image.
      OSError: a folder of a store cannot be listed.
    """
    found = _Found()
    if isinstance(files, Store):
        _take("", _list_all(files, path), path, found)
    else:
        _walk(path, "", found, ())
    return require_images(
        FileSource(path=path, kind="folder", files=files, root=path, found=found),
        cure=_folder_cure(found),
    )


def open_list(path: str, files: Disk | Store = DISK) -> Source:
    """Opens the images a text file names.

    One path a line, relative to the list's folder, then optionally a tab and a class name (on
    every line or on none). Blank lines and lines that begin with # are left out. In a store, an
    object that is not there is found out when it is read.

    Raises:
      DataError: no usable image.
    """
    try:
        content = io.BytesIO(files.read(path))
    except OSError as error:
        text = f"cannot read the list {path}: {error.strerror}"
        raise refusal(DataError, text, cause=error) from error
    lines = [line.rstrip("\n") for line in io.TextIOWrapper(content, "utf-8", "surrogateescape")]
    root = os.path.dirname(path)
    found, labels, folder_index = _Found(), [], {}
    for line in lines:
        entry, _, label = line.partition("\t")
        if not entry.strip() or entry.lstrip().startswith("#"):
            continue
        if "://" in entry:
            found.rejected.append((entry.strip(), "a URL"))
            continue
        entry = os.path.normpath(entry.strip())
        reason = _entry_rejection(root, entry, files)
        if reason:
            found.rejected.append((os.path.join(root, entry), reason))
            continue
        folder, file_name = os.path.split(entry)
        found.add(folder_index.setdefault(folder, len(folder_index)), file_name)
        labels.append(label.strip())
    found.folders = list(folder_index)
    if any(labels) and not all(labels):
        raise DataError(
            f"{path}: {sum(map(bool, labels))} of {len(labels)} lines have a class name; "
            "write 'path<tab>class' on every line, or a path alone"
        )
    source = FileSource(
        path=path,
        kind="list",
        files=files,
        root=root,
        found=found,
        labels=labels if any(labels) else None,
    )
    absolute = "" if isinstance(files, Store) else ", or absolute"
    return require_images(source, cure=f"paths must be relative to the list's folder{absolute}")


def open_files(path: str, names: list[str], files: Disk | Store = DISK) -> Source:
    """Opens image files, in the given order; `path` is what named them.

    Raises:
      DataError: no usable image.
    """
    found = _Found()
    found.folders = [""]
    for name in names:
        reason = None if isinstance(files, Store) else _rejection(name)
        if reason:
            found.rejected.append((name, reason))
        else:
            found.add(0, name)
    source = FileSource(path=path, kind="file", files=files, root="", found=found)
    return require_images(source, cure="use a file that holds an image")


class _Found:
    """What a scan collects."""

    def __init__(self):
        self.folders: list[str] = []  # relative to the root
        self.folder_of: list[int] = []
        self.file_names: list[str] = []
        self.rejected: list[tuple[str, str]] = []
        self.num_other_files = 0
        self.shard_example = ""

    def add(self, folder: int, file_name: str) -> None:
        self.folder_of.append(folder)
        self.file_names.append(file_name)

    def add_other(self, path: str) -> None:
        self.num_other_files += 1
        if path.endswith(".tar") or ".array_record" in os.path.basename(path):
            self.shard_example = path


def _walk(root: str, folder: str, found: _Found, ancestors: tuple[tuple[int, int], ...]) -> None:
    here = os.path.join(root, folder) if folder else root
    try:
        status = os.stat(here)
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            return
        with os.scandir(here) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        found.rejected.append((here, error.strerror or "unreadable"))
        return
    folder_index = len(found.folders)
    found.folders.append(folder)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            below = f"{folder}/{entry.name}" if folder else entry.name
            _walk(root, below, found, (*ancestors, identity))
            continue
        reason = _rejection(entry.path)
        if reason is None:
            found.add(folder_index, entry.name)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            found.rejected.append((entry.path, reason))
        else:
            found.add_other(entry.path)


def _list_all(store: Store, root: str) -> dict[str, list[Entry]]:
    """The content of a folder of a store and of all below it, many at a time."""
    listed, level = {}, [""]
    with concurrent.futures.ThreadPoolExecutor(_NUM_FOLDERS_AT_A_TIME) as pool:
        while level:
            urls = [os.path.join(root, folder) for folder in level]
            listed |= zip(level, pool.map(store.list_folder, urls), strict=True)
            level = [
                os.path.join(folder, entry.name)
                for folder in level
                for entry in listed[folder]
                if entry.is_folder and not entry.name.startswith(".")
            ]
    return listed


def _take(folder: str, listed: dict[str, list[Entry]], root: str, found: _Found) -> None:
    """Takes over the images of a listing, in the order of `_walk`."""
    folder_index = len(found.folders)
    found.folders.append(folder)
    for entry in listed[folder]:
        below = os.path.join(folder, entry.name)
        if entry.name.startswith("."):
            continue
        if entry.is_folder:
            _take(below, listed, root, found)
        elif not entry.name.lower().endswith(IMAGE_SUFFIXES):
            found.add_other(os.path.join(root, below))
        elif not entry.size:
            found.rejected.append((os.path.join(root, below), "zero bytes"))
        else:
            found.add(folder_index, entry.name)


def _entry_rejection(root: str, entry: str, files: Disk | Store) -> str | None:
    """Why a path in a list cannot be an image; None if it can."""
    if not isinstance(files, Store):
        return _rejection(os.path.join(root, entry))
    return "absolute" if os.path.isabs(entry) else None


def _rejection(path: str) -> str | None:
    """Why a file cannot be an image, by its first bytes; None if it can."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            header = os.read(file, NUM_SNIFFED_BYTES)
        finally:
            os.close(file)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or "unreadable"
    if not header:
        return "zero bytes"
    return None if image_format(header) else "not an image"


def _folder_cure(found: _Found) -> str:
    if found.shard_example:
        folder, name = os.path.split(found.shard_example)
        pattern = "*.tar" if name.endswith(".tar") else "*.array_record*"
        return f"for the shards in it use '{os.path.join(folder, pattern)}'"
    return "use a folder that holds images, at any depth"
