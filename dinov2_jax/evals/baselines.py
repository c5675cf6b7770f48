"""Features that need no network: what a trained one has to beat.

In: a bank and queries of uint8 images. Out: float32 features of both, made comparable by cosine.
"""

from collections.abc import Iterable

import numpy as np
from PIL import Image

BASELINES = ("raw_pixels", "color_stats")
RAW_PIXELS_SIZE_PX = 32


def baseline_features(
    bank: Iterable[tuple[np.ndarray, int]], queries: Iterable[tuple[np.ndarray, int]], kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Features of bank and queries, centred by the bank's mean.

    All levels are positive: uncentred, their cosines would hardly differ. Colour statistics are
    also divided by the bank's standard deviation, so that all of them count.

    Args:
      bank: (image, label) pairs, images uint8 `[height, width, c]`.
      queries: likewise.
      kind: one of `BASELINES`.

    Returns:
      float32 `[b, d]` and `[q, d]`.
    """
    function = {"raw_pixels": raw_pixels, "color_stats": color_stats}[kind]
    bank, queries = (np.stack([function(image) for image, _ in x]) for x in (bank, queries))
    scale = np.maximum(bank.std(axis=0), 1e-6) if kind == "color_stats" else 1.0
    center = bank.mean(axis=0)
    return (bank - center) / scale, (queries - center) / scale


def raw_pixels(image: np.ndarray) -> np.ndarray:
    """The image shrunk to 32 px and flattened: uint8 `[height, width, c]` -> float32 `[d]`."""
    size = (RAW_PIXELS_SIZE_PX, RAW_PIXELS_SIZE_PX)
    channels = [Image.fromarray(np.ascontiguousarray(x)) for x in np.moveaxis(image, -1, 0)]
    return np.stack([np.asarray(x.resize(size, Image.BOX), np.float32) for x in channels]).ravel()


def color_stats(image: np.ndarray) -> np.ndarray:
    """Each channel's mean and deviation: uint8 `[height, width, c]` -> float32 `[2 c]`."""
    pixels = image.reshape(-1, image.shape[-1]).astype(np.float32)
    return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)])
