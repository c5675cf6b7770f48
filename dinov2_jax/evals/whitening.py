"""PCA-whitening learnt on a database and applied to all that is compared with it.

In float64, a few rows at a time: a copy of the Met's database would take gigabytes.
"""

from collections.abc import Iterator

import numpy as np

_ROWS_AT_ONCE = 4_096


def whitened(
    width: int | None, database: np.ndarray, *others: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Database and others at unit length, along the database's first components, each of unit
    variance, at unit length again; as they are where `width` is None.

    Args:
      width: components that are kept.
      database: `[b, d]`.
      *others: `[any, d]`.

    Returns:
      float32 `[b, width]`, `[any, width]`.

    Raises:
      ValueError: more components than the database has.
    """
    if width is None:
        return database, *others
    mean = sum(rows.sum(axis=0) for _, rows in _unit_rows(database)) / len(database)
    values, vectors = _components(database, mean)
    rank = int((values > 1e-10 * values[0]).sum())
    if not 1 <= width <= rank:
        raise ValueError(
            f"whitening to {width} must be to between 1 and the {rank} directions in which the "
            "database varies; lower --whiten"
        )
    matrix = vectors[:, :width] / np.sqrt(values[:width])
    return tuple(_turned(x, mean, matrix) for x in (database, *others))


def _components(database: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances, largest first, and directions `[d, components]`."""
    count, width = database.shape
    if count < width:
        _, scales, rows = np.linalg.svd(_unit_length(database) - mean, full_matrices=False)
        return scales**2 / count, rows.T
    covariance = np.zeros((width, width))
    for _, rows in _unit_rows(database):
        rows -= mean
        covariance += rows.T @ rows
    values, vectors = np.linalg.eigh(covariance / count)
    return values[::-1], vectors[:, ::-1]


def _turned(x: np.ndarray, mean: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    found = np.empty((len(x), matrix.shape[1]), np.float32)
    for where, rows in _unit_rows(x):
        found[where] = _unit_length((rows - mean) @ matrix)
    return found


def _unit_rows(x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """A few rows after the other: which they are, and they at unit length."""
    for start in range(0, len(x), _ROWS_AT_ONCE):
        where = slice(start, start + _ROWS_AT_ONCE)
        yield where, _unit_length(x[where])


def _unit_length(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.maximum(norms, np.finfo(np.float64).tiny)
