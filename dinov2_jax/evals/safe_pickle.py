"""Reads a pickle of plain data (lists, dicts, strings, numbers, numpy arrays) and nothing else.

A pickle is a program: whatever it names is imported and called. Here only what rebuilds numpy's
arrays may be named, so that a ground truth from the network cannot run code.
"""

import pathlib
import pickle
from typing import Any

from dinov2_jax.data.records import DataError

# Old files say numpy.core, new ones numpy._core; the oldest protocols have no bytes of their own.
_ALLOWED = {
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
    "_codecs.encode",
    "__builtin__.bytes",
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")
        return super().find_class(module, name)


def load(path: pathlib.Path) -> Any:
    """The content of a file.

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
