"""An `.npy` file of which not all rows are in memory, nor their number known, until the end.

bfloat16, which the format does not have, is stored as 2-byte void: its bits, which nothing takes
for numbers.
"""

import pathlib
from collections.abc import Sequence

import numpy as np


class NpyFile:
    """Grows by rows; the header is written again when their number is known."""

    def __init__(self, path: pathlib.Path, row_shape: Sequence[int], dtype: np.dtype):
        self._row_shape, self._dtype, self._num_rows = row_shape, dtype, 0
        self._file = open(path, "wb")
        self._header_end = self._write_header()

    def append(self, rows: np.ndarray) -> None:
        assert rows.dtype == self._dtype and list(rows.shape[1:]) == list(self._row_shape)
        self._num_rows += len(rows)
        self._file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.seek(0)
        # numpy leaves room for more digits of the first axis.
        assert self._write_header() == self._header_end
        self._file.close()

    def _write_header(self) -> int:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._num_rows, *self._row_shape),
            },
        )
        return self._file.tell()
