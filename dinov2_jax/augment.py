"""Colour augmentation on the device, inside jit: what the host leaves undone after cropping.

In: uint8 crops and their parameters (`AUGMENT_COLUMNS`). Out: normalised floats. Inside, an image
is a list of its channels, float32 `[n, height, width]`, in levels of 0 to 255 (so that whole
numbers stay exact); levels are not rounded between operations, unlike Pillow's.
Behaviour follows dinov2/data/augmentations.py (Apache-2.0), whose operations are torchvision's on
Pillow images. Images without three channels have no saturation, hue or greyscale: these are off.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.data.batch import AUGMENT_COLUMNS

# Row `jitter_order` names the operations (indices into brightness, contrast, saturation, hue).
_JITTER_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's conversion to "L"

Planes = list[jax.Array]


def augment(
    crops: jax.Array,
    params: jax.Array,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    blur_kernel_size_px: int = 9,
    solarize_threshold: int = 128,
) -> jax.Array:
    """Applies jitter, greyscale, blur and solarize, each by its sample's parameters; normalises.

    Parameters that switch everything off give exactly `normalize(crops)`.

    Args:
      crops: uint8 `[n, height, width, c]`.
      params: float32 `[n, len(AUGMENT_COLUMNS)]`, the columns of `dinov2_jax.data.batch`.
      mean: of pixels in [0, 1], one per channel.
      std: likewise.
      blur_kernel_size_px: odd; at most 2 * min(height, width) - 1 (the border is reflected).
      solarize_threshold: levels (0 to 255) from this one on are inverted.

    Returns:
      `[n, height, width, c]`, normalised, float32.

    Raises:
      ValueError: the kernel is even or too large, or `params` or `mean` has the wrong size.
    """
    height, width = crops.shape[-3:-1]
    if blur_kernel_size_px % 2 == 0 or blur_kernel_size_px // 2 >= min(height, width):
        raise ValueError(
            f"{blur_kernel_size_px=} must be odd and at most {2 * min(height, width) - 1} for "
            f"crops of {height} x {width}; change augment.blur_kernel_size_px"
        )
    if params.shape != (len(crops), len(AUGMENT_COLUMNS)):
        raise ValueError(
            f"{params.shape=} must be ({len(crops)}, {len(AUGMENT_COLUMNS)}): a row for every "
            f"crop with the columns {', '.join(AUGMENT_COLUMNS)}"
        )
    column = {name: params[:, i].astype(jnp.float32) for i, name in enumerate(AUGMENT_COLUMNS)}
    with jax.named_scope("augment"):
        planes = [crops[..., i].astype(jnp.float32) for i in range(crops.shape[-1])]
        planes = jitter(planes, column)
        if len(planes) == 3:
            gray = grey(planes)
            planes = [_where(column["grayscale"] > 0, gray, x) for x in planes]
        planes = blur(planes, column["blur_sigma"], kernel_size_px=blur_kernel_size_px)
        planes = solarize(planes, column["solarize"] > 0, threshold=solarize_threshold)
        return normalize(jnp.stack(planes, axis=-1), mean=mean, std=std)


def normalize(
    images: jax.Array,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> jax.Array:
    """Levels (0 to 255) to `(level / 255 - mean) / std`.

    Args:
      images: uint8 or float `[..., height, width, c]`.
      mean: of pixels in [0, 1], one per channel.
      std: likewise.

    Returns:
      The same shape, in float32.

    Raises:
      ValueError: `mean` or `std` has not one entry per channel.
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"{mean=} and {std=} must have one entry for each of {channels} channels; "
            "set augment.mean and augment.std"
        )
    scale = 1 / (255 * np.asarray(std, np.float64))
    shift = np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    return images.astype(jnp.float32) * scale.astype(np.float32) - shift.astype(np.float32)


def grey(planes: Planes) -> jax.Array:
    """Greyscale `[n, height, width]` of three planes; of any other number, their mean."""
    if len(planes) != 3:
        return sum(planes) / len(planes)
    return sum(weight * x for weight, x in zip(_GREY_WEIGHTS, planes, strict=True))


def jitter(planes: Planes, column: dict[str, jax.Array]) -> Planes:
    """Brightness, contrast, saturation and hue, in each sample's own order.

    Brightness, contrast and saturation mix the image with black, with its mean grey (rounded to a
    whole level, as Pillow does) and with its greyscale: all three are
    `clip(factor * x + towards_grey * grey(x) + offset)`. So four rounds, each of that one formula
    or the hue, serve all 24 orders; looping over them keeps XLA from recomputing earlier rounds
    inside later ones.

    Args:
      planes: c arrays `[n, height, width]`, levels in [0, 255].
      column: the parameters by name, each `[n]`.

    Returns:
      Likewise, clipped to [0, 255].
    """
    is_on = column["jitter"] > 0
    orders = jnp.asarray(_JITTER_ORDERS)[column["jitter_order"].astype(jnp.int32)]  # [n, 4]
    has_colour = len(planes) == 3

    def one_round(planes: Planes, operation: jax.Array) -> tuple[Planes, None]:
        def factor_of(kind: int, name: str) -> jax.Array:
            return jnp.where((operation == kind) & is_on, column[name], 1.0)

        brightness = factor_of(_BRIGHTNESS, "brightness")
        contrast = factor_of(_CONTRAST, "contrast")
        saturation = factor_of(_SATURATION, "saturation") if has_colour else 1.0
        gray = grey(planes)
        mean_level = jnp.floor(gray.mean(axis=(1, 2)) + 0.5)  # [n]
        factor = _per_image(brightness * contrast * saturation)  # at most one of them is not 1
        offset = _per_image((1 - contrast) * mean_level)
        mixed = [factor * x + offset for x in planes]
        if has_colour:
            mixed = [x + _per_image(1 - saturation) * gray for x in mixed]
        mixed = [jnp.clip(x, 0, 255) for x in mixed]
        if has_colour:
            # A shift of 0 is left out, since the way to HSV and back is exact only to rounding.
            has_shift = (operation == _HUE) & is_on & (column["hue"] != 0)
            shifted = shift_hue(planes, column["hue"])
            mixed = [_where(has_shift, a, b) for a, b in zip(shifted, mixed, strict=True)]
        return mixed, None

    return jax.lax.scan(one_round, planes, orders.T)[0]


def shift_hue(planes: Planes, turns: jax.Array) -> Planes:
    """Turns the hue of HSV by `turns` `[n]` (1 is a full turn), keeping saturation and value.

    With value v = max, chroma c = max - min and hue h in sixths of a turn, channel j of the result
    is `v - c * clip(min(t, 4 - t), 0, 1)` with `t = (5 - 2 j + h) mod 6`: the piecewise linear
    hexagon of the usual six cases, without the cases.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    per_chroma = 1 / jnp.where(chroma == 0, 1, chroma)
    hue = jnp.where(
        value == red,
        (green - blue) * per_chroma,
        jnp.where(value == green, (blue - red) * per_chroma + 2, (red - green) * per_chroma + 4),
    )
    hue = hue + 6 * _per_image(turns)
    result = []
    for corner in (5, 3, 1):
        t = corner + hue
        t = t - 6 * jnp.floor(t / 6)
        result.append(value - chroma * jnp.clip(jnp.minimum(t, 4 - t), 0, 1))
    return result


def blur(planes: Planes, sigma_px: jax.Array, *, kernel_size_px: int) -> Planes:
    """Gaussian blur with reflected borders (the edge pixel is not repeated), as torchvision's.

    Args:
      planes: c arrays `[n, height, width]`.
      sigma_px: `[n]`; 0 leaves the image as it is.
      kernel_size_px: odd; the Gaussian is cut off there and normalised to sum 1.

    Returns:
      Likewise.
    """
    offsets = np.arange(kernel_size_px, dtype=np.float32) - kernel_size_px // 2
    # Below a thousandth of a pixel the kernel is a single 1 anyway; 0 would give 0 / 0.
    weights = jnp.exp(-0.5 * (offsets / jnp.maximum(sigma_px, 1e-3)[:, None]) ** 2)
    weights = weights / weights.sum(axis=1, keepdims=True)  # [n, kernel]
    height, width = planes[0].shape[1:]
    x = jnp.stack(planes, axis=1)  # [n, c, height, width]
    # As products with banded matrices, rows then columns: wasteful but free on a matrix unit, and
    # measured as quick on the CPU as shifted sums. Three bfloat16 passes stay far below one level
    # of 255, which a single pass does not.
    precision = jax.lax.Precision.HIGH
    x = jnp.einsum("nij,ncjk->ncik", blur_matrix(weights, height), x, precision=precision)
    x = jnp.einsum("nlk,ncik->ncil", blur_matrix(weights, width), x, precision=precision)
    return [_where(sigma_px > 0, x[:, i], plane) for i, plane in enumerate(planes)]


def blur_matrix(weights: jax.Array, size: int) -> jax.Array:
    """Entry (i, j) is the weight of input j in output i. `weights` `[n, kernel]`.

    Returns `[n, size, size]`; its rows sum to 1, the reflected border included.
    """
    taps = weights.shape[1]
    inputs = np.arange(size)[:, None] + np.arange(taps) - taps // 2  # [size, kernel]
    inputs = np.abs(inputs)
    inputs = np.where(inputs < size, inputs, 2 * (size - 1) - inputs)
    # Sums of masks rather than a scatter: cheap everywhere, and nothing to look up.
    return sum(
        _per_image(weights[:, tap]) * (inputs[:, tap, None] == jnp.arange(size))
        for tap in range(taps)
    )


def solarize(planes: Planes, is_on: jax.Array, *, threshold: float) -> Planes:
    """Inverts the levels from `threshold` on, in the images where `is_on` `[n]`."""
    return [jnp.where(_per_image(is_on) & (x >= threshold), 255 - x, x) for x in planes]


def _per_image(values: jax.Array) -> jax.Array:
    return values[:, None, None]


def _where(is_on: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(_per_image(is_on), a, b)
