"""What a depth head is trained on: crops of turned and mirrored images, their colours moved.

In: an image uint8 `[h, w, 3]` and its depth in metres, float32 `[h, w]`, 0 where there is none.
Out: the same of one crop's size. Behaviour follows the public Monocular-Depth-Estimation-Toolbox
(Apache-2.0), which the reference's heads were trained with. Numpy and Pillow; randomness is passed.
"""

import dataclasses

import numpy as np
from PIL import Image

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.dense.resample import resize_bilinear, resize_nearest, scaled_size

Pixels = tuple[np.ndarray, np.ndarray]
WHOLE = (slice(None), slice(None))
# Rows and columns of NYU's images that are not white borders.
NYU_CROP = (slice(45, 472), slice(43, 608))
_GAMMA, _COLOR = (0.9, 1.1), (0.9, 1.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthAugment:
    """Settings of the views.

    Attributes:
      crop_px: height and width of the crop.
      brightness: lowest and highest factor.
      rotate_degrees: largest angle; half of the images are turned.
      flip_probability: of a mirror image.
      color_probability: of another gamma, brightness and colour.
    """

    crop_px: tuple[int, int]
    brightness: tuple[float, float] = (0.75, 1.25)
    rotate_degrees: float = 2.5
    flip_probability: float = 0.5
    color_probability: float = 0.5

    def __call__(self, image: np.ndarray, depth: np.ndarray, rng: np.random.Generator) -> Pixels:
        """A random view."""
        check_crop(image.shape[:2], self.crop_px)
        if rng.random() < 0.5:
            angle = rng.uniform(-self.rotate_degrees, self.rotate_degrees)
            image = _turned(image, angle, Image.Resampling.BILINEAR)
            depth = _turned(depth, angle, Image.Resampling.NEAREST)
        if rng.random() < self.flip_probability:
            image, depth = image[:, ::-1], depth[:, ::-1]
        top, left = (
            rng.integers(0, side - crop + 1)
            for side, crop in zip(depth.shape, self.crop_px, strict=True)
        )
        box = slice(top, top + self.crop_px[0]), slice(left, left + self.crop_px[1])
        image, depth = image[box], depth[box]
        if rng.random() < self.color_probability:
            image = self._colored(image, rng)
        return image, depth

    def _colored(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Levels from 0 to 255, and not shares, are raised to the power, as for the released heads.
        x = image.astype(np.float32) ** rng.uniform(*_GAMMA)
        x *= rng.uniform(*self.brightness) * rng.uniform(*_COLOR, size=3).astype(np.float32)
        return np.clip(x, 0, 255).astype(np.uint8)


def prepared(
    image: np.ndarray,
    depth: np.ndarray,
    *,
    short_side_px: int | None,
    box: tuple[slice, slice] = WHOLE,
) -> Pixels:
    """A part of an image and its depth, scaled as the whole is where its short side is given.

    Args:
      image, depth: see the module.
      short_side_px: of the whole image; None: as it is.
      box: rows and columns of the part, before it is scaled.
    """
    whole, (image, depth) = min(depth.shape), (image[box], depth[box])
    if short_side_px is None:
        return image, depth
    size = scaled_size(*depth.shape, short_side_px * min(depth.shape) / whole)
    return resize_bilinear(image, *size), resize_nearest(depth, *size)


def fixed_view(image: np.ndarray, depth: np.ndarray, *, crop_px: tuple[int, int]) -> Pixels:
    """The centred crop, always the same."""
    check_crop(image.shape[:2], crop_px)
    box = tuple(
        slice((side - crop) // 2, (side - crop) // 2 + crop)
        for side, crop in zip(depth.shape, crop_px, strict=True)
    )
    return image[box], depth[box]


def check_crop(size: tuple[int, int], crop_px: tuple[int, int]) -> None:
    """Raises DataError where a crop is larger than the image."""
    if any(crop > side for crop, side in zip(crop_px, size, strict=True)):
        raise DataError(
            f"crop {crop_px[0]} x {crop_px[1]} (height x width) must fit into images of "
            f"{size[0]} x {size[1]}; choose another --crop"
        )


def _turned(pixels: np.ndarray, degrees: float, method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).rotate(degrees, method))
