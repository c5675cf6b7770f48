"""Sliding windows: what the network sees of an image, and one image of what it said of each.

Stretching a window's logits to its pixels, the mean where windows overlap, and the resizing to the
image's own size are all linear, and rows and columns apart: two small matrices do it at once, and a
strip of the result needs no more memory than it has. Rule: mmseg's `slide_inference` (Apache-2.0).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.models.task_heads.resize import bilinear_matrix

# A strip has at most so many numbers; its width is rounded up, so that fewer shapes are compiled.
_STRIP_NUMBERS, _WIDTH_STEP = 1 << 23, 64


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side; the last is moved back to end with the image.

    Args:
      size: of the image; below `crop`, one window has all of it.
      crop: of a window.
      stride: from one to the next.
    """
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, size - crop), 0) for i in range(count)]


def cut_windows(image: np.ndarray, crop: int, stride: int) -> np.ndarray:
    """Windows of `[height, width, c]`, row by row: `[rows * columns, crop, crop, c]` or less."""
    rows, columns = (window_starts(side, crop, stride) for side in image.shape[:2])
    return np.stack([image[y : y + crop, x : x + crop] for y in rows for x in columns])


def window_matrices(size: int, crop: int, stride: int, grid: int, new_size: int) -> np.ndarray:
    """One axis of the way from patches of windows to pixels of an image.

    Args:
      size: of the image that was cut.
      crop, stride: see `window_starts`.
      grid: patches of a window.
      new_size: of the image wanted.

    Returns:
      float32 `[windows, new_size, grid]`; summed over the last axis and the first, 1.
    """
    starts, crop = window_starts(size, crop, stride), min(crop, size)
    stretched = bilinear_matrix(grid, crop, align_corners=False)
    placed = np.zeros((len(starts), size, grid), np.float32)
    covers = np.zeros(size, np.float32)
    for window, start in enumerate(starts):
        placed[window, start : start + crop] = stretched
        covers[start : start + crop] += 1
    return bilinear_matrix(size, new_size, align_corners=False) @ (placed / covers[:, None])


def strips(height: int, width: int, num_channels: int) -> Iterator[tuple[slice, int]]:
    """Rows of an image that fit into memory together: which, and how many with padding."""
    count = max(min(_STRIP_NUMBERS // (_rounded(width) * num_channels), height), 1)
    for start in range(0, height, count):
        yield slice(start, min(start + count, height)), count


def assemble_strip(
    maps: jax.Array, rows: np.ndarray, columns: np.ndarray, strip: slice, num_rows: int
) -> jax.Array:
    """A strip of the image from the maps of its windows.

    Args:
      maps: `[windows down, windows across, h, w, c]`.
      rows, columns: of `window_matrices`, for the image wanted.
      strip, num_rows: of `strips`.

    Returns:
      `[num_rows, width rounded up, c]`; what is beyond the image is 0.
    """
    rows = rows[:, strip]
    rows = np.pad(rows, ((0, 0), (0, num_rows - rows.shape[1]), (0, 0)))
    width = columns.shape[1]
    return _assemble(maps, rows, np.pad(columns, ((0, 0), (0, _rounded(width) - width), (0, 0))))


@jax.jit
def _assemble(maps: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST
    down = jnp.einsum("ysp,yxpqc->sxqc", rows, maps, precision=precision)
    return jnp.einsum("xwq,sxqc->swc", columns, down, precision=precision)


def _rounded(width: int) -> int:
    return -(-width // _WIDTH_STEP) * _WIDTH_STEP
