"""Our archival format: one safetensors file, the reference's names, facts in its header.

A file appears whole or not at all: it is written beside its place and renamed. Numpy only.
"""

import os
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy


def write_safetensors(
    path: str | os.PathLike, flat: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes named arrays, replacing the file if there is one.

    Args:
      path: the file; its folder must exist.
      flat: name -> array, as `to_reference` makes it.
      metadata: facts for the header; names and values are strings.

    Raises:
      OSError: the folder is missing, not writable or full; `path` is then as it was.
    """
    path = pathlib.Path(path)
    # The library reads memory as if every array were contiguous, without a check.
    flat = {name: np.asarray(array, order="C") for name, array in flat.items()}
    # One name, so that a killed run leaves one file, which the next replaces.
    written = path.with_name(f".{path.name}.tmp")
    try:
        safetensors.numpy.save_file(flat, written, metadata=dict(metadata))
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}; free space or choose a folder") from error
    finally:
        written.unlink(missing_ok=True)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads `(name -> array, metadata)`.

    Raises:
      ValueError: the file is truncated, or no safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} must be a whole safetensors file ({error}); fetch it again"
        ) from error
