"""Resizing as OpenCV does it by default, which dense training and testing were made with. Numpy.

In and out: `[height, width, ..]`. Bilinear without antialiasing, and nearest by the lower index:
other than Pillow's, and than what preprocessing of whole images uses.
"""

import numpy as np


def scaled_size(height: int, width: int, short_side_px: float) -> tuple[int, int]:
    """Height and width where the short side is `short_side_px`, rounded half up as in mmcv."""
    scale = short_side_px / min(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 `[h, w, c]` to uint8 `[height, width, c]`."""
    if image.shape[:2] == (height, width):
        return image
    x = image.astype(np.float32)
    for axis, size in enumerate((height, width)):
        old = x.shape[axis]
        source = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
        low = np.minimum(np.floor(source).astype(int), max(old - 2, 0))
        high = np.minimum(low + 1, old - 1)
        share = (source - low).astype(np.float32).reshape((-1, *[1] * (x.ndim - 1 - axis)))
        first, second = x.take(low, axis), x.take(high, axis)
        x = first + (second - first) * share
    return np.rint(x).astype(np.uint8)


def resize_nearest(target: np.ndarray, height: int, width: int) -> np.ndarray:
    """Numbers `[h, w]` to `[height, width]`, none of them new."""
    rows, columns = (
        np.minimum(np.floor(np.arange(size) * (old / size)).astype(int), old - 1)
        for old, size in zip(target.shape, (height, width), strict=True)
    )
    return target[rows[:, None], columns]
