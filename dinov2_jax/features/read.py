"""Reading features back: `read(OUT)` gives arrays that are mapped from disk, and their table."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dinov2_jax.convert.safetensors_file import read_safetensors
from dinov2_jax.features.index import read_index, shard_path
from dinov2_jax.features.outputs import DTYPES
from dinov2_jax.features.table import TABLE_FILE, StoreError, require_pyarrow


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of many images. Row i of everything is one image.

    Attributes:
      arrays: by name, `[rows, ..]`: a `ShardedArray` of a folder, else numpy.
      ids: int64 `[rows]`, index of each image in the source; ascending, and bad images are missing.
      paths: names of the images.
      labels: int32 `[rows]`, index into `label_names`; None where the source has none.
      label_names: classes of the source.
      index: all that is known of them; see `index.make_index`.
    """

    arrays: dict[str, "np.ndarray | ShardedArray"]
    ids: np.ndarray
    paths: list[str]
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    index: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, name: str) -> "np.ndarray | ShardedArray":
        """An array by name."""
        if name not in self.arrays:
            raise KeyError(f"{name!r} must be one of {sorted(self.arrays)}, which were extracted")
        return self.arrays[name]


class ShardedArray:
    """An array in pieces along axis 0, mapped from disk: rows are read when they are asked for.

    Index it as numpy: `x[3]`, `x[10:20]`, `x[ids]`, `x[mask]`, `x[10:20, 0]`; axes after the first
    take numbers and slices only, and anything else is an IndexError. `numpy.asarray(x)` reads all
    of it.

    Attributes:
      shards: the pieces, in order.
      shape, dtype: of the whole.
    """

    def __init__(self, shards: list[np.ndarray], row_shape: tuple[int, ...], dtype: np.dtype):
        self.shards, self.dtype = shards, dtype
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)
        self.shape = (int(self._ends[-1]) if shards else 0, *row_shape)

    def __repr__(self) -> str:
        return f"ShardedArray({self.shape}, {self.dtype}, {len(self.shards)} shards)"

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        for shard in self.shards:
            yield from shard

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("shards are joined by copying them; leave copy=False out")
        return np.asarray(self[:], dtype)

    def __getitem__(self, key) -> np.ndarray:
        rows, *rest = (key or (slice(None),)) if isinstance(key, tuple) else (key,)
        if any(x is Ellipsis or x is None for x in (rows, *rest)):
            raise IndexError("shards take no `...` and no new axis; numpy.asarray(x) takes both")
        if not all(_is_number(x) or isinstance(x, slice) for x in rest):
            raise IndexError("only rows may be listed; index the result again, x[rows][:, columns]")
        if _is_number(rows):
            shard, row = self._locate(np.int64(range(len(self))[rows]))
            return self.shards[int(shard)][(int(row), *rest)]
        if isinstance(rows, slice):
            numbers = np.arange(*rows.indices(len(self)))
        else:
            numbers = np.arange(len(self))[rows]
        rest = (slice(None), *rest)
        row_shape = np.empty((0, *self.shape[1:]), self.dtype)[rest].shape[1:]
        found = np.empty((*numbers.shape, *row_shape), self.dtype)
        shards, positions = self._locate(numbers)
        for i in np.unique(shards).tolist():
            is_here = shards == i
            found[is_here] = self.shards[i][rest][positions[is_here]]
        return found

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row in it of rows of the whole."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        return shards, numbers - np.concatenate([[0], self._ends])[shards]


def _is_number(key) -> bool:
    return isinstance(key, (int, np.integer)) and not isinstance(key, bool)


def read(out: str | os.PathLike) -> FeatureSet:
    """Opens what `extract` wrote; numbers of a folder are read when they are used.

    Args:
      out: the folder, or the `.npz` or `.safetensors` file.

    Raises:
      ValueError: no features are there, or not all of them yet.
    """
    out = pathlib.Path(out).expanduser()
    index = read_index(out)
    if "rows" not in index:
        there = sum(shard_path(out, index, i).exists() for i in range(index["num_shards"]))
        raise StoreError(
            f"{out} is not complete: {there} of {index['num_shards']} shards are there; run the "
            "command that made it again"
        )
    arrays, table = _read_folder(out, index) if out.is_dir() else _read_file(out, index)
    return FeatureSet(
        arrays=arrays,
        ids=table["id"],
        paths=table["path"],
        labels=table.get("label"),
        label_names=tuple(index["label_names"]),
        index=index,
    )


def _read_folder(out: pathlib.Path, index: Mapping[str, Any]):
    require_pyarrow()
    import pyarrow
    import pyarrow.parquet

    folders = [shard_path(out, index, i) for i in range(index["num_shards"])]
    arrays = {}
    for name, x in index["arrays"].items():
        dtype = DTYPES[x["dtype"]]
        shards = [
            np.load(folder / f"{name}.npy", mmap_mode="r").view(dtype)
            for folder, num_rows in zip(folders, index["rows"], strict=True)
            if num_rows  # there is nothing to map in an empty file
        ]
        arrays[name] = ShardedArray(shards, tuple(x["shape"]), dtype)
    tables = [pyarrow.parquet.read_table(folder / TABLE_FILE) for folder in folders]
    joined = pyarrow.concat_tables(tables)
    table = {
        name: joined[name].to_pylist() if name == "path" else joined[name].to_numpy()
        for name in joined.column_names
    }
    return arrays, table


def _read_file(out: pathlib.Path, index: Mapping[str, Any]):
    if out.suffix == ".safetensors":
        found, facts = read_safetensors(out)
        table = {"path": json.loads(facts["paths"])}
    else:
        with np.load(out) as file:
            found = {name: file[name] for name in file.files if name != "index"}
        table = {"path": found.pop("path").tolist()}
    arrays = {name: found.pop(name).view(DTYPES[x["dtype"]]) for name, x in index["arrays"].items()}
    return arrays, found | table
