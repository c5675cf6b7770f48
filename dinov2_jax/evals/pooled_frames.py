"""Features of frames as features of videos: their mean, or one frame after the other."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dinov2_jax.features.read import FeatureSet, ShardedArray

POOLINGS = ("mean", "concat")


class PooledArray:
    """An array of videos, made from one of frames where it is read.

    Attributes:
      shape: `[videos, ..]`, the last axis `frames` times as long for "concat".
    """

    def __init__(
        self,
        frames: np.ndarray | ShardedArray,
        rows: np.ndarray,
        *,
        pooling: str,
    ):
        """Binds `[rows, .., d]` of frames, and int `[videos, frames]`: which are of each video."""
        self._frames, self._rows, self._pooling = frames, rows, pooling
        factor = rows.shape[1] if pooling == "concat" else 1
        self.shape = (len(rows), *frames.shape[1:-1], factor * frames.shape[-1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> np.ndarray:
        """float32; `key` is rows as numpy takes them, or (rows, a number of the second axis)."""
        rows, *rest = key if isinstance(key, tuple) else (key,)
        numbers = self._rows[rows]  # [.., frames]
        found = np.asarray(self._frames[(numbers, *rest)], np.float32)  # [.., frames, *rest, d]
        axis = numbers.ndim - 1
        if self._pooling == "mean":
            return found.mean(axis=axis)
        found = np.moveaxis(found, axis, -2)
        return found.reshape(*found.shape[:-2], -1)


def pool_frames(
    features: FeatureSet, labels: np.ndarray, *, frames_per_video: int, pooling: str
) -> tuple[FeatureSet, np.ndarray]:
    """Features and labels of those videos whose frames could all be read.

    Args:
      features: of a `VideoFrames`.
      labels: of its videos.
      frames_per_video: of it.
      pooling: of `POOLINGS`.
    """
    labels = np.asarray(labels)
    row_of = np.full(len(labels) * frames_per_video, -1)
    row_of[features.ids] = np.arange(len(features))
    rows = row_of.reshape(-1, frames_per_video)
    whole = np.flatnonzero((rows >= 0).all(axis=1))
    arrays: Mapping[str, PooledArray] = {
        name: PooledArray(x, rows[whole], pooling=pooling) for name, x in features.arrays.items()
    }
    paths: Sequence[str] = [features.paths[row].rpartition("#")[0] for row in rows[whole, 0]]
    return (
        dataclasses.replace(features, arrays=arrays, ids=whole, paths=paths, labels=labels[whole]),
        labels[whole],
    )
