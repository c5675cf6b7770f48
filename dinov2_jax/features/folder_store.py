"""A folder of features: shards, each there whole or not at all.

Every shard is a folder of its own, `shard-00000-of-00008`: an `.npy` file an array, a table with
the same rows, and `bad_images.txt` if there are any. It is written beside its place, row by row,
and renamed, so that a killed run loses the shard it was at.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov2_jax.beside import written_beside
from dinov2_jax.features.index import (
    INDEX_FILE,
    check_same,
    format_index,
    read_index,
    shard_path,
)
from dinov2_jax.features.npy_file import NpyFile
from dinov2_jax.features.outputs import DTYPES
from dinov2_jax.features.table import (
    BAD_IMAGES_FILE,
    TABLE_FILE,
    Bad,
    Row,
    StoreError,
    format_bad,
    require_pyarrow,
    write_table,
)


class FolderStore:
    """Writes shards, in any order and by any number of processes. A context manager."""

    def __init__(self, out: pathlib.Path, index: Mapping[str, Any], *, process: tuple[int, int]):
        """Binds a folder; entering makes it.

        Args:
          out: the folder.
          index: of `index.make_index`.
          process: number of this process among those that write here, and how many they are.
        """
        self._out, self._index = out, dict(index)
        self._process = "{}-of-{}".format(*process)
        self._part = out / f".part-{self._process}"
        self._lock_file = out / f".lock-{self._process}"
        self._files: dict[str, NpyFile] = {}
        self._rows: list[Row] = []
        self._bad: list[Bad] = []

    def __enter__(self) -> "FolderStore":
        require_pyarrow()
        try:
            if self._out.is_dir():
                self._is_to_be_made()  # before the lock, which would stay in a refused folder
            self._out.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._lock_file, "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except BlockingIOError as error:
            self._lock.close()
            raise StoreError(f"{self._out} is being written by another run; wait for it") from error
        except OSError as error:
            raise StoreError(
                f"{self._out} cannot be written ({error.strerror or error}); choose another"
            ) from error
        try:
            if self._is_to_be_made():
                self._write(INDEX_FILE, format_index(self._index))
        except StoreError:
            self._lock.close()
            raise
        shutil.rmtree(self._part, ignore_errors=True)  # of a run that was killed
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # where the disk is full, again
                file.close()
        shutil.rmtree(self._part, ignore_errors=True)
        self._lock.close()

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        return [i for i in range(self._index["num_shards"]) if not self.shard(i).exists()]

    def shard(self, number: int) -> pathlib.Path:
        """Where a shard is, or will be."""
        return shard_path(self._out, self._index, number)

    def num_bad(self) -> int:
        """Bad images in the shards that are there."""
        return sum(len(self._bad_of(i)) for i in range(self._index["num_shards"]))

    def append(
        self, rows: Sequence[Row], bad: Sequence[Bad], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Adds rows to the shard that is being written, and names bad images of it."""
        if not self._files:
            self._part.mkdir()
            self._files = {
                name: NpyFile(self._part / f"{name}.npy", x["shape"], DTYPES[x["dtype"]])
                for name, x in self._index["arrays"].items()
            }
        self._rows += rows
        self._bad += bad
        for name, array in arrays.items():
            self._files[name].append(array)

    def close_shard(self, number: int) -> None:
        """The shard is complete: it appears in its place.

        Raises:
          StoreError: the folder is by now of other features.
        """
        self._check_index()
        for file in self._files.values():
            file.close()
        write_table(self._part / TABLE_FILE, self._rows, bool(self._index["label_names"]))
        if self._bad:
            (self._part / BAD_IMAGES_FILE).write_text(format_bad(self._bad))
        try:
            os.rename(self._part, self.shard(number))
        except OSError:
            # A process of another division may have been here first, with the same numbers.
            if not self.shard(number).exists():
                raise
            shutil.rmtree(self._part)
        self._files, self._rows, self._bad = {}, [], []

    def finish(self, rejected: Sequence[Bad]) -> bool:
        """Completes the index if all shards are there. Returns whether they are.

        Args:
          rejected: images found bad at the scan.

        Raises:
          StoreError: as `close_shard`.
        """
        self._check_index()
        if self.missing():
            return False
        import pyarrow.parquet

        numbers = range(self._index["num_shards"])
        tables = [pyarrow.parquet.read_metadata(self.shard(i) / TABLE_FILE) for i in numbers]
        num_bad = len(rejected) + self.num_bad()
        if num_bad:
            self.name_bad(rejected)
        done = {"rows": [table.num_rows for table in tables], "bad_images": num_bad}
        self._write(INDEX_FILE, format_index(self._index | done))
        for leftover in self._out.glob(".part-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return True

    def name_bad(self, rejected: Sequence[Bad]) -> pathlib.Path:
        """Writes `bad_images.txt` of all shards, as far as they are; returns its path."""
        lines = [line for i in range(self._index["num_shards"]) for line in self._bad_of(i)]
        text = format_bad(rejected) + "".join(lines) + format_bad(self._bad)
        self._write(BAD_IMAGES_FILE, text)
        return self._out / BAD_IMAGES_FILE

    def _check_index(self) -> None:
        """Another process, started at the same moment, may have written an index of its own."""
        check_same(self._out, read_index(self._out), self._index)

    def _is_to_be_made(self) -> bool:
        """Compares with what is there; whether nothing is yet, so that the index is ours."""
        if (self._out / INDEX_FILE).exists():
            old = read_index(self._out)
            others = [x for x in self._out.glob(".lock-*") if x != self._lock_file]
            if others or any(self._out.glob("shard-*")):
                check_same(self._out, old, self._index)
                return False
        else:
            others = sorted(p.name for p in self._out.iterdir() if not p.name.startswith("."))
            if others:
                raise StoreError(
                    f"{self._out} has no {INDEX_FILE} but holds {others[0]}: it is a folder of "
                    "something else; choose another, which will be made"
                )
        return True

    def _bad_of(self, number: int) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.shard(number) / BAD_IMAGES_FILE).read_text().splitlines(keepends=True)
        return []

    def _write(self, name: str, text: str) -> None:
        with written_beside(self._out / name, mark=self._process) as beside:
            beside.write_text(text)
