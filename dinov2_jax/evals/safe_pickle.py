"""Reads a pickle of plain data (lists, dicts, strings, numbers, numpy arrays) and nothing else.

A pickle is a program: whatever it names is imported and called. Here it may name only what stands
for numpy's arrays, and gets our own classes for it, so that a ground truth from the network cannot
run code. Numpy's own would not do: they make arrays of objects out of bytes, which are addresses.
"""

import pathlib
import pickle
import re
from typing import Any

import numpy as np

from dinov2_jax.data.records import DataError


class _DType:
    """Stands for `numpy.dtype`: of numbers, strings and bytes, without fields."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[biufcSU]\d+", code):
            raise pickle.UnpicklingError(f"it holds an array of {code}, which is not plain data")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(list):
    """Stands for `numpy.ndarray`, and becomes the list of its numbers."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, raw = state
        self[:] = _array(shape, kind, raw, "F" if is_fortran else "C").tolist()


def _array(shape: tuple, kind: _DType, raw: bytes | str, order: str) -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)  # old files say str
    return np.ndarray(shape, kind.dtype, raw, order=order)


def _frombuffer(raw: Any, kind: _DType, shape: tuple, order: str) -> _Array:
    return _Array(_array(shape, kind, raw, order).tolist())


# Old files say numpy.core, new ones numpy._core; the oldest protocols have no bytes of their own.
_ALLOWED = {
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray.scalar": lambda kind, raw: _array((), kind, raw, "C").item(),
    "numpy._core.numeric._frombuffer": _frombuffer,
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "__builtin__.bytes": bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        if full not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")
        return _ALLOWED[full]


def load(path: pathlib.Path) -> Any:
    """The content of a file; arrays are lists.

    Raises:
      DataError: it is damaged, or holds more than plain data; nothing of it was run.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return _Unpickler(file, encoding="latin1").load()
        # Of a damaged file the unpickler raises whatever its bytes happen to mean.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise DataError(f"{path} cannot be used: {reason}; fetch it again") from error
