"""Features that need no network: what a trained one has to beat.

In: uint8 images `[height, width, c]`. Out: float32 `[d]`, compared by cosine like any features. Of
the ways to centre them, those were taken that scored best on photographs, so as not to flatter.
"""

from collections.abc import Iterable

import numpy as np
from PIL import Image

RAW_PIXELS_SIZE_PX = 32


def raw_pixels(image: np.ndarray) -> np.ndarray:
    """All pixels of the image at 32 px, less its mean level: `[32 * 32 * c]`."""
    size = (RAW_PIXELS_SIZE_PX, RAW_PIXELS_SIZE_PX)
    channels = [Image.fromarray(np.ascontiguousarray(x)) for x in np.moveaxis(image, -1, 0)]
    pixels = np.stack([np.asarray(x.resize(size, Image.Resampling.BOX)) for x in channels])
    pixels = pixels.ravel().astype(np.float32)
    return pixels - pixels.mean()


def color_stats(image: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of each channel: `[2 c]`."""
    pixels = image.reshape(-1, image.shape[-1]).astype(np.float32)
    return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)])


def baseline_features(images: Iterable[tuple[np.ndarray, int]]) -> dict[str, np.ndarray]:
    """Both features `[images, d]` by name, of (image, label) pairs."""
    rows = [(raw_pixels(image), color_stats(image)) for image, _ in images]
    pixels, stats = (np.stack(x) for x in zip(*rows, strict=True))
    return {"raw_pixels": pixels, "color_stats": stats}
