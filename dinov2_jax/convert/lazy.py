"""Arrays that are read when they are used, so that a model passes through memory piece by piece.

In: where an array is. Out: its shape and type at once, its numbers on demand. Numpy only.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array to be loaded by `numpy.asarray`, anew each time.

    Attributes:
      shape: its shape.
      dtype: its type.
      load: reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.load()
        return array if dtype is None else array.astype(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes when loaded."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


Arrays = np.ndarray | LazyArray


def concatenate(parts: Sequence[Arrays]) -> LazyArray:
    """Joins arrays along axis 0."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyArray(
        shape, parts[0].dtype, lambda: np.concatenate([np.asarray(part) for part in parts])
    )


def split(array: Arrays, count: int) -> list[LazyArray]:
    """Cuts an array along axis 0 into equal parts."""
    size = array.shape[0] // count
    return [
        LazyArray(
            (size, *array.shape[1:]),
            array.dtype,
            lambda start=start: np.asarray(array)[start : start + size],
        )
        for start in range(0, size * count, size)
    ]


def stack(parts: Sequence[Arrays], transform: Callable[[np.ndarray], np.ndarray]) -> LazyArray:
    """Stacks transformed arrays of one shape on a new axis 0; one at a time is in memory."""
    blank = transform(np.broadcast_to(np.zeros((), parts[0].dtype), parts[0].shape))
    shape = (len(parts), *blank.shape)

    def load() -> np.ndarray:
        stacked = np.empty(shape, parts[0].dtype)
        for i, part in enumerate(parts):
            stacked[i] = transform(np.asarray(part))
        return stacked

    return LazyArray(shape, parts[0].dtype, load)
