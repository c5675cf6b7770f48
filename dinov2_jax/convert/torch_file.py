"""PyTorch's own files: the only file that imports torch, which is an extra.

A `.pth` may run code when it is read; `weights_only` refuses that. A file appears whole or not at
all. In and out: flat dicts of arrays, as everywhere in this room.
"""

import collections
import ctypes
import mmap
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dinov2_jax.beside import written_beside
from dinov2_jax.convert.lazy import Arrays, LazyArray
from dinov2_jax.convert.spec import METADATA_KEY


def read_torch(path: str | os.PathLike) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Reads `(name -> lazy array, metadata)` from a `.pth`, its numbers when they are used.

    A dict that holds one of "teacher", "model" or "state_dict" is opened: a training checkpoint of
    the reference, or a released task head.

    Raises:
      ValueError: the file is damaged, wants to run code, or holds something else than tensors.
      ModuleNotFoundError: PyTorch is missing; its text says how to get it.
    """
    torch = require_torch()
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # PyTorch does not look at the checksums
            if damaged:
                raise ValueError(f"{path} is damaged in {damaged}; fetch it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old files, which are read all the same
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error):
            raise ValueError(
                f"{path} holds Python objects and not only tensors, and reading them could run "
                "code: refused. Save its state dict alone where you trust it: "
                "torch.save(model.state_dict(), ..)"
            ) from error
        raise ValueError(
            f"{path} must be a whole .pth file of tensors alone, nothing else is unpickled; fetch "
            "it again"
        ) from error
    except PermissionError:
        raise
    # PyTorch looks for the end of a truncated archive before its beginning: an OSError.
    except (OSError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} must be a whole .pth file ({_line(error)}); fetch it again"
        ) from error
    for key in ("teacher", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, not a {type(content).__name__}")
    strange = [name for name, tensor in content.items() if not isinstance(tensor, torch.Tensor)]
    if strange:
        raise ValueError(f"{path} must hold tensors only; {strange[:5]} are something else")
    facts = getattr(content, "_metadata", None) or {}
    text = facts.get(METADATA_KEY)
    return (
        {name: _lazy(torch, tensor, is_mapped=is_zip) for name, tensor in content.items()},
        {METADATA_KEY: text} if isinstance(text, str) else {},
    )


def write_torch(
    path: str | os.PathLike,
    flat: Mapping[str, Arrays],
    metadata: Mapping[str, str],
    *,
    key: str | None = None,
) -> None:
    """Writes a state dict that `torch.load(weights_only=True)` and `load_state_dict` take.

    Args:
      path: the file; its folder must exist.
      flat: name -> array.
      metadata: facts, kept where PyTorch keeps module versions, which it does not look up.
      key: put the state dict under this name of a dict; None: it is the file.

    Raises:
      OSError: the file cannot be written; `path` is then as it was.
      ModuleNotFoundError: PyTorch is missing.
    """
    torch = require_torch()
    state = collections.OrderedDict()
    for name, array in flat.items():
        # A copy: torch shares memory, and takes only what may be written.
        array = np.array(array, order="C")
        is_bfloat16 = array.dtype == ml_dtypes.bfloat16
        tensor = torch.from_numpy(array.view(np.int16) if is_bfloat16 else array)
        state[name] = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
    state._metadata = collections.OrderedDict({"": {"version": 1}, **metadata})
    try:
        with written_beside(path) as beside, open(beside, "wb") as file:
            torch.save(state if key is None else {key: state}, file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer reports a full disk as RuntimeError
        raise OSError(
            f"cannot write {path}: {_line(error)}; free space or choose a folder"
        ) from error


def _lazy(torch, tensor, *, is_mapped: bool) -> LazyArray:
    is_bfloat16 = tensor.dtype == torch.bfloat16

    def load() -> np.ndarray:
        bits = tensor.detach().view(torch.int16) if is_bfloat16 else tensor.detach()
        array = bits.numpy().copy()
        if is_mapped:
            _forget(tensor)
        return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array

    empty = torch.empty(0, dtype=torch.int16 if is_bfloat16 else tensor.dtype).numpy()
    dtype = np.dtype(ml_dtypes.bfloat16) if is_bfloat16 else empty.dtype
    return LazyArray(tuple(tensor.shape), dtype, load)


def _forget(tensor) -> None:
    """Drops the pages of a tensor that is mapped from a file; they are read again when needed."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def require_torch():
    """Imports torch. Raises ModuleNotFoundError, saying how to get it, where it is missing."""
    try:
        import torch
    except ImportError as error:
        raise ModuleNotFoundError(
            "PyTorch reads and writes .pth files, and is not installed; pip install torch"
        ) from error
    return torch
