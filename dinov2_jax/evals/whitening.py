"""PCA-whitening learnt on a database and applied to all that is compared with it."""

import numpy as np


def whitened(
    width: int | None, database: np.ndarray, *others: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Database and others at unit length, along the database's first components, each of unit
    variance, at unit length again; as they are where `width` is None.

    Args:
      width: components that are kept.
      database: `[b, d]`.
      *others: `[any, d]`.

    Raises:
      ValueError: more components than the database has.
    """
    if width is None:
        return database, *others
    database, *others = (_unit_length(x) for x in (database, *others))
    mean = database.mean(axis=0)
    values, vectors = _components(database - mean)
    rank = int((values > 1e-10 * values[0]).sum())
    if not 1 <= width <= rank:
        raise ValueError(
            f"whitening to {width} must be to between 1 and the {rank} directions in which the "
            "database varies; lower --whiten"
        )
    matrix = vectors[:, :width] / np.sqrt(values[:width])
    return tuple(_unit_length((x - mean) @ matrix) for x in (database, *others))


def _components(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances, largest first, and directions `[d, components]`."""
    if centred.shape[0] < centred.shape[1]:
        _, scales, rows = np.linalg.svd(centred, full_matrices=False)
        return scales**2 / len(centred), rows.T
    values, vectors = np.linalg.eigh(np.cov(centred, rowvar=False, bias=True))
    return values[::-1], vectors[:, ::-1]


def _unit_length(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return (x / np.maximum(norms, np.finfo(np.float64).tiny)).astype(np.float32)
