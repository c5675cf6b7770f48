"""Bilinear resizing as PyTorch does it, with corners aligned or not.

In and out: images `[b, height, width, c]`; two small matrices made on the host.
"""

import jax
import jax.numpy as jnp
import numpy as np


def resize_bilinear(x: jax.Array, size: tuple[int, int], *, align_corners: bool) -> jax.Array:
    """Resizes `[b, height, width, c]` to `[b, *size, c]`, without antialiasing.

    Args:
      x: images or feature maps.
      size: height and width wanted.
      align_corners: whether the centres of the corner pixels, and not their outer edges, meet.
    """
    if x.shape[1:3] == tuple(size):
        return x
    rows, cols = (
        bilinear_matrix(old, new, align_corners=align_corners)
        for old, new in zip(x.shape[1:3], size, strict=True)
    )
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("yh,xw,bhwc->byxc", rows, cols, x, precision=precision).astype(x.dtype)


def bilinear_matrix(size: int, new_size: int, *, align_corners: bool) -> np.ndarray:
    """One axis of the resampling, float32 `[new_size, size]`; rows sum to 1."""
    positions = np.arange(new_size, dtype=np.float64)
    if align_corners:
        source = positions * (size - 1) / max(new_size - 1, 1)
    else:
        source = np.maximum((positions + 0.5) * size / new_size - 0.5, 0)
    low = np.minimum(np.floor(source).astype(int), size - 1)
    share = source - low
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size), low), 1 - share)
    np.add.at(matrix, (np.arange(new_size), np.minimum(low + 1, size - 1)), share)
    return matrix.astype(np.float32)
