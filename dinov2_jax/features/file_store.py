"""A small set of features: kept in memory, and written as one file at the end."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov2_jax.beside import written_beside
from dinov2_jax.convert.safetensors_file import write_safetensors
from dinov2_jax.features.index import METADATA_KEY, check_same, read_index, row_bytes
from dinov2_jax.features.outputs import DTYPES
from dinov2_jax.features.table import BAD_IMAGES_FILE, Bad, Row, StoreError, format_bad, printable

SUFFIXES = (".npz", ".safetensors")
MAX_BYTES = 2 * 2**30


class FileStore:
    """Keeps a small set in memory and writes it as one file at the end. As `FolderStore`."""

    def __init__(self, out: pathlib.Path, index: Mapping[str, Any]):
        """Binds a `.npz` or `.safetensors` file; entering looks at what is there.

        Args:
          out: the file.
          index: of `index.make_index`.
        """
        self._out, self._index = out, dict(index)
        self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in index["arrays"]}
        self._rows: list[Row] = []
        self._bad: list[Bad] = []

    def __enter__(self) -> "FileStore":
        size = self._index["images"] * row_bytes(self._index)
        if size > MAX_BYTES:
            raise StoreError(
                f"{self._out} would hold {size / 1e9:.1f} GB, more than the {MAX_BYTES / 1e9:.1f} "
                "GB of a small set; choose a folder, a name without a suffix"
            )
        if not self._out.absolute().parent.is_dir():
            raise StoreError(f"{self._out.parent} must be a folder; create it")
        if self._out.exists():
            check_same(self._out, read_index(self._out), self._index)
        return self

    def __exit__(self, *_) -> None:
        pass

    def missing(self) -> list[int]:
        """[0] unless the file is there."""
        return [] if self._out.exists() else [0]

    def num_bad(self) -> int:
        """0: nothing is there before the end."""
        return 0

    def append(
        self, rows: Sequence[Row], bad: Sequence[Bad], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Adds rows, and names bad images."""
        self._rows += rows
        self._bad += bad
        for name, array in arrays.items():
            self._arrays[name].append(array)

    def close_shard(self, number: int) -> None:
        """All rows have been added; `finish` writes them."""

    def name_bad(self, rejected: Sequence[Bad]) -> pathlib.Path:
        """Writes the list of bad images beside the file; returns its path."""
        path = self._out.with_name(f"{self._out.name}.{BAD_IMAGES_FILE}")
        path.write_text(format_bad([*rejected, *self._bad]))
        return path

    def finish(self, rejected: Sequence[Bad]) -> bool:
        """Writes the file, and its bad images beside it. Returns True."""
        if self._out.exists():
            return True
        arrays = {
            name: np.concatenate(
                [np.zeros((0, *x["shape"]), DTYPES[x["dtype"]]), *self._arrays[name]]
            )
            for name, x in self._index["arrays"].items()
        }
        arrays["id"] = np.array([row.id for row in self._rows], np.int64)
        if self._index["label_names"]:
            arrays["label"] = np.array([row.label for row in self._rows], np.int32)
        paths = [printable(row.path) for row in self._rows]
        num_bad = len(rejected) + len(self._bad)
        index = json.dumps(self._index | {"rows": [len(self._rows)], "bad_images": num_bad})
        if num_bad:
            self.name_bad(rejected)
        if self._out.suffix == ".safetensors":
            facts = {METADATA_KEY: index, "paths": json.dumps(paths)}
            write_safetensors(self._out, arrays, facts)
            return True
        with written_beside(self._out) as beside, open(beside, "wb") as file:
            np.savez(file, **arrays, path=np.array(paths, str), index=np.array(index))
        return True
