"""One image to its global and local crops, and the parameters of their colour augmentation.

Geometry (random resized crop, horizontal flip) happens here, on the host, to uint8; colours change
on the device (`augment.py`) by the parameters drawn here.
Behaviour follows dinov2/data/augmentations.py and torchvision's RandomResizedCrop.
"""

import dataclasses
import math

import numpy as np

from dinov2_jax.data.batch import AUGMENT_COLUMNS
from dinov2_jax.data.image_ops import resize_box, to_pillow

# Of global crop 1, global crop 2 and each local crop. The reference hands its blur the complement
# of the probability, so that it executes the first row; this trained the released weights.
BLUR_PROBABILITY = {"as_released": (0.0, 0.9, 0.5), "as_intended": (1.0, 0.1, 0.5)}
NUM_GLOBAL_CROPS = 2
_NUM_CROP_TRIES = 10
_NUM_JITTER_ORDERS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Cuts crops and draws augmentation parameters; the fields are keys of the configuration.

    Attributes:
      global_crop_scale, local_crop_scale: share of the image's area, uniform.
      aspect_ratio: width over height, uniform in its logarithm.
      mode: row of `BLUR_PROBABILITY`, unless `blur_probability` is given.
      blur_probability, solarize_probability: of global crop 1, global crop 2 and a local crop.
      brightness, contrast, saturation: factors are uniform in 1 +- this, at least 0.
      hue: shift uniform in +- this, in turns.
    """

    global_crop_size_px: int = 224
    global_crop_scale: tuple[float, float] = (0.32, 1.0)
    local_crop_size_px: int = 98
    local_crop_scale: tuple[float, float] = (0.05, 0.32)
    num_local_crops: int = 8
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    mode: str = "as_released"
    blur_probability: tuple[float, ...] = ()
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0)

    def __post_init__(self):
        if not self.blur_probability and self.mode not in BLUR_PROBABILITY:
            raise ValueError(f"{self.mode=} must be one of {sorted(BLUR_PROBABILITY)}")
        for name in ("blur_probability", "solarize_probability"):
            given = getattr(self, name)
            if len(given) != 3 and not (name == "blur_probability" and not given):
                raise ValueError(
                    f"{name}={given} must hold 3 numbers: global crop 1, global crop 2, local crop"
                )
        for name in ("global_crop_scale", "local_crop_scale", "aspect_ratio", "blur_sigma_px"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={(low, high)} must be (low, high), 0 < low <= high")
        if self.num_local_crops < 0:
            raise ValueError(f"{self.num_local_crops=} must not be negative; 0 is DINO without")

    @property
    def num_crops(self) -> int:
        """Crops an image: globals, then locals."""
        return NUM_GLOBAL_CROPS + self.num_local_crops

    def __call__(
        self,
        image: np.ndarray,
        rng: np.random.Generator,
        *,
        global_crops: np.ndarray,
        local_crops: np.ndarray,
    ) -> None:
        """Cuts all crops of an image into the two arrays given.

        The generator's consumption does not depend on the image.

        Args:
          image: uint8 [h, w, c].
          global_crops: uint8 [g, size, size, c], written.
          local_crops: uint8 [l, size, size, c], written.
        """
        height, width = image.shape[:2]
        planes = to_pillow(image)
        draws = rng.random((self.num_crops, _NUM_CROP_TRIES, 4)).tolist()
        flips = (rng.random(self.num_crops) < self.flip_probability).tolist()
        for i in range(self.num_crops):
            is_global = i < NUM_GLOBAL_CROPS
            out = global_crops[i] if is_global else local_crops[i - NUM_GLOBAL_CROPS]
            box = crop_box(
                height,
                width,
                draws[i],
                scale=self.global_crop_scale if is_global else self.local_crop_scale,
                aspect_ratio=self.aspect_ratio,
            )
            out[...] = resize_box(planes, box, *out.shape[:2], is_flipped=flips[i])

    def draw_augmentation(self, rng: np.random.Generator) -> np.ndarray:
        """Draws float32 [g + l, len(AUGMENT_COLUMNS)], globals first."""
        uniform = dict(
            zip(
                (*AUGMENT_COLUMNS, "blur"),
                rng.random((len(AUGMENT_COLUMNS) + 1, self.num_crops)),
                strict=True,
            )
        )
        blur_probability = self.blur_probability or BLUR_PROBABILITY[self.mode]
        sigma = _between(*self.blur_sigma_px, uniform["blur_sigma"])
        columns = {
            "jitter": uniform["jitter"] < self.jitter_probability,
            "brightness": _between(*_factors(self.brightness), uniform["brightness"]),
            "contrast": _between(*_factors(self.contrast), uniform["contrast"]),
            "saturation": _between(*_factors(self.saturation), uniform["saturation"]),
            "hue": _between(-self.hue, self.hue, uniform["hue"]),
            "jitter_order": np.floor(uniform["jitter_order"] * _NUM_JITTER_ORDERS),
            "grayscale": uniform["grayscale"] < self.grayscale_probability,
            "blur_sigma": np.where(uniform["blur"] < self._per_crop(blur_probability), sigma, 0.0),
            "solarize": uniform["solarize"] < self._per_crop(self.solarize_probability),
        }
        return np.stack([columns[name] for name in AUGMENT_COLUMNS], axis=-1).astype(np.float32)

    def _per_crop(self, probabilities: tuple[float, ...]) -> np.ndarray:
        return np.array([*probabilities[:2], *[probabilities[2]] * self.num_local_crops])


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size_px: int,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """One random resized crop, unflipped, of uint8 [h, w, c]: uint8 [size_px, size_px, c]."""
    draws = rng.random((_NUM_CROP_TRIES, 4)).tolist()
    box = crop_box(*image.shape[:2], draws, scale=scale, aspect_ratio=aspect_ratio)
    return resize_box(to_pillow(image), box, size_px, size_px)


def crop_box(
    height: int,
    width: int,
    draws: list[list[float]],
    *,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Box of a random resized crop, by torchvision's law.

    Args:
      height, width: of the image.
      draws: [tries, 4] uniform numbers in [0, 1): area, aspect ratio, top, left.

    Returns:
      left, top, right, bottom. The first try that fits; after all, the largest centred box within
      the limits of `aspect_ratio`.

    References: torchvision.transforms.RandomResizedCrop.get_params.
    """
    low, high = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * _between(*scale, area_draw)
        ratio = math.exp(_between(low, high, ratio_draw))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(top_draw * (height - box_height + 1))
            left = int(left_draw * (width - box_width + 1))
            return left, top, left + box_width, top + box_height
    box_width, box_height = width, height
    if width / height < aspect_ratio[0]:
        box_height = round(width / aspect_ratio[0])
    elif width / height > aspect_ratio[1]:
        box_width = round(height * aspect_ratio[1])
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return left, top, left + box_width, top + box_height


def _between(low: float, high: float, uniform):
    return low + (high - low) * uniform


def _factors(strength: float) -> tuple[float, float]:
    return max(0.0, 1 - strength), 1 + strength
