"""What a segmentation head is trained on: crops of resized images, flipped, their colours moved.

In: an image uint8 `[h, w, 3]` and its classes int16 `[h, w]`. Out: the same of one crop's size, or
smaller: see `padded`. Behaviour follows mmseg's pipeline as in the reference's configurations
(Apache-2.0); hue is turned in 256 steps and not in 180. Numpy and Pillow; randomness is passed.
"""

import dataclasses

import numpy as np
from PIL import Image

from dinov2_jax.evals.dense.mask_sets import IGNORED
from dinov2_jax.evals.dense.resample import resize_bilinear, resize_nearest, scaled_size

Pixels = tuple[np.ndarray, np.ndarray]
_CROP_TRIES = 10
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE_DEGREES = 32.0, (0.5, 1.5), (0.5, 1.5), 36


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskAugment:
    """Settings of the views.

    Attributes:
      short_side_px: of the image before it is scaled at random.
      ratio: lowest and highest scale.
      crop_px: side of the crop.
      max_class_share: a crop with more of one class is drawn again, up to ten times.
      flip_probability: of a mirror image.
      is_distorted: whether brightness, contrast, saturation and hue change.
    """

    short_side_px: int
    ratio: tuple[float, float]
    crop_px: int
    max_class_share: float = 0.75
    flip_probability: float = 0.5
    is_distorted: bool = True

    def __call__(self, image: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> Pixels:
        """A random view."""
        short_side_px = int(self.short_side_px * rng.uniform(*self.ratio))
        size = scaled_size(*image.shape[:2], short_side_px)
        # The crop is found on the small mask; the image is resized and cut only then.
        classes = resize_nearest(classes, *size)
        box = _random_crop(classes, self.crop_px, self.max_class_share, rng)
        image, classes = resize_bilinear(image, *size)[box], classes[box]
        if rng.random() < self.flip_probability:
            image, classes = image[:, ::-1], classes[:, ::-1]
        return distorted(image, rng) if self.is_distorted else image, classes


def fixed_view(
    image: np.ndarray, classes: np.ndarray, *, short_side_px: int, crop_px: int
) -> Pixels:
    """The centred crop, always the same."""
    size = scaled_size(*image.shape[:2], short_side_px)
    box = tuple(slice(max(side - crop_px, 0) // 2, None) for side in size)
    image, classes = resize_bilinear(image, *size)[box], resize_nearest(classes, *size)[box]
    return image[:crop_px, :crop_px], classes[:crop_px, :crop_px]


def padded(image: np.ndarray, classes: np.ndarray, *, side_px: int) -> Pixels:
    """A normalised image and its classes, filled up to a square: with 0 and `IGNORED`."""
    below, right = (side_px - side for side in classes.shape)
    return (
        np.pad(image, ((0, below), (0, right), (0, 0))),
        np.pad(classes, ((0, below), (0, right)), constant_values=IGNORED),
    )


def distorted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each of brightness, contrast, saturation and hue changed with probability 1/2.

    Contrast comes before saturation and hue or after them, by a throw of its own.
    """
    if rng.random() < 0.5:
        image = _levels(image + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS))
    contrast = rng.uniform(*_CONTRAST) if rng.random() < 0.5 else 1.0
    contrast_is_first = rng.random() < 0.5
    if contrast_is_first:
        image = _levels(image * contrast)
    saturation = rng.uniform(*_SATURATION) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-_HUE_DEGREES, _HUE_DEGREES) if rng.random() < 0.5 else 0.0
    if saturation != 1 or hue:
        image = _turned(image, saturation, hue)
    return image if contrast_is_first else _levels(image * contrast)


def _turned(image: np.ndarray, saturation: float, hue_degrees: float) -> np.ndarray:
    hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
    hsv[..., 0] += np.uint8(round(hue_degrees * 256 / 360) % 256)  # wraps around, as hue does
    hsv[..., 1] = _levels(hsv[..., 1] * saturation)
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def _random_crop(
    classes: np.ndarray, crop_px: int, max_class_share: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    for _ in range(1 + _CROP_TRIES):
        starts = [rng.integers(0, max(side - crop_px, 0) + 1) for side in classes.shape]
        box = tuple(slice(start, start + crop_px) for start in starts)
        part = classes[box]
        counts = np.bincount(part[part != IGNORED])
        counts = counts[counts > 0]
        if len(counts) > 1 and counts.max() / counts.sum() < max_class_share:
            break
    return box


def _levels(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0, 255).astype(np.uint8)
