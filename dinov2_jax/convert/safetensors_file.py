"""The safetensors format: one file of named arrays, with facts in its header.

A file is read and written array by array, so that a large model needs little memory, and appears
whole or not at all: it is written beside its place and renamed. Numpy only.
"""

import json
import os
import struct
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors

from dinov2_jax.beside import written_beside
from dinov2_jax.convert.lazy import Arrays, LazyArray

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def write_safetensors(
    path: str | os.PathLike, flat: Mapping[str, Arrays], metadata: Mapping[str, str]
) -> None:
    """Writes named arrays, replacing the file if there is one.

    Args:
      path: the file; its folder must exist.
      flat: name -> array, as `to_reference` makes it; lazy arrays are read one at a time.
      metadata: facts for the header; names and values are strings.

    Raises:
      OSError: the folder is missing, not writable or full; `path` is then as it was.
      ValueError: an array of a type that the format does not have.
    """
    header, end = {"__metadata__": dict(metadata)} if metadata else {}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Larger types first, as the format's own writer does: every array is aligned.
    order = sorted(flat, key=lambda name: -flat[name].dtype.itemsize)
    for name in order:
        dtype, shape = flat[name].dtype, flat[name].shape
        if dtype not in names:
            raise ValueError(f"{name} has {dtype=}, which must be one of {sorted(DTYPES)}; cast it")
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with written_beside(path) as beside, open(beside, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                file.write(np.asarray(flat[name], order="C").reshape(-1).view(np.uint8))
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}; free space or choose a folder") from error


def open_safetensors(path: str | os.PathLike) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Reads `(name -> lazy array, metadata)`: the header; numbers when they are used.

    Raises:
      ValueError: the file is truncated, no safetensors file, or has a type that numpy lacks.
    """
    try:
        # The library checks the header against the file's size.
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} must be a whole safetensors file ({error}); fetch it again"
        ) from error
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
    if unknown:
        raise ValueError(
            f"{path} has arrays of type {unknown}, which must be among {sorted(DTYPES)}; cast them"
        )
    return {
        name: LazyArray(
            tuple(entry["shape"]),
            DTYPES[entry["dtype"]],
            _loader(path, 8 + size + entry["data_offsets"][0], entry),
        )
        for name, entry in header.items()
    }, metadata


def _loader(path, offset: int, entry: Mapping):
    def load() -> np.ndarray:
        count = int(np.prod(entry["shape"]))
        array = np.fromfile(path, DTYPES[entry["dtype"]], count, offset=offset)
        return array.reshape(entry["shape"])

    return load


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`open_safetensors`, with every array read."""
    flat, metadata = open_safetensors(path)
    return {name: np.asarray(array) for name, array in flat.items()}, metadata
