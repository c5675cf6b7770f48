"""From an image to classes or to metres, at its own size, by a head on a frozen network.

Segmentation: sliding windows of one or several sizes, mirrored too, their probabilities averaged.
Depth: the whole image and its mirror image. Images are uint8 `[height, width, 3]`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dinov2_jax.evals.dense.devices import Devices
from dinov2_jax.evals.dense.heads import DenseHead
from dinov2_jax.evals.dense.resample import resize_bilinear, scaled_size
from dinov2_jax.evals.dense.windows import (
    assemble_strip,
    cut_windows,
    strips,
    window_matrices,
    window_starts,
)
from dinov2_jax.model import Model
from dinov2_jax.models.task_heads.resize import resize_bilinear as resize_maps

# Normalised images [b, height, width, 3] -> [b, h, w, c]
Maps = Callable[[np.ndarray], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slide:
    """How an image is looked at.

    Attributes:
      short_side_px: of the image at ratio 1.
      crop_px, stride_px: of the windows.
      ratios: of the sizes.
      flip: whether mirror images are looked at too.
    """

    short_side_px: int
    crop_px: int
    stride_px: int
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False


class BatchedMaps:
    """Computes maps of images, so many at once, in few different batch sizes.

    Maps are those of a pure function (parameters, normalised images) -> `[b, ..]`.
    """

    def __init__(self, model: Model, compute: Callable, variables: Any, batch_size: int):
        """Binds parameters.

        Args:
          model: frozen.
          compute: (variables, parameters, normalised images) -> `[b, ..]`.
          variables: its first argument, on the devices once.
          batch_size: images at once.
        """
        self._devices, self._batch_size = Devices(), batch_size
        self._arguments = self._devices.copies((variables, model.params))
        self._compute = jax.jit(compute)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Maps of normalised images `[b, height, width, 3]`.

        Raises:
          ValueError: they are not finite.
        """
        found = []
        for start in range(0, len(images), self._batch_size):
            piece = images[start : start + self._batch_size]
            # Powers of two: a dozen window counts are not a dozen compilations.
            size = min(1 << (len(piece) - 1).bit_length(), self._batch_size)
            full = np.pad(piece, ((0, size - len(piece)), (0, 0), (0, 0), (0, 0)))
            maps = self._compute(*self._arguments, self._devices.rows(full))
            found.append((maps, len(piece)))
        maps = np.concatenate([np.asarray(maps)[:count] for maps, count in found])
        if not np.isfinite(maps).all():
            raise ValueError(
                "features and predictions must be finite, and are not; the weights of the network "
                "or of the head are not sound: take those before they broke"
            )
        return maps


def head_maps(model: Model, head: DenseHead, variables, *, batch_size: int) -> BatchedMaps:
    """`BatchedMaps` of a head: logits, or metres."""

    def compute(variables, params, images):
        outputs = head.embed(model, params, images)
        return head.apply(variables, outputs, model.grid(*images.shape[1:3]))

    return BatchedMaps(model, compute, variables, batch_size)


def normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 -> float32, of mean 0 and deviation 1 over ImageNet."""
    scaled = image.astype(np.float32) / 255
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def predict_classes(
    image: np.ndarray,
    maps: Maps,
    slide: Slide,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    is_logits: bool = True,
) -> np.ndarray:
    """The best class of every pixel.

    Args:
      image: uint8 `[height, width, 3]`.
      maps: of windows.
      slide: how to look.
      mean, std: of the network's input.
      is_logits: whether maps become probabilities by a softmax, or are such already.

    Returns:
      int16 `[height, width]`.
    """
    height, width = image.shape[:2]
    looks = [
        _look(image, maps, slide, ratio, is_mirrored, mean, std)
        for ratio in slide.ratios
        for is_mirrored in ((False, True) if slide.flip else (False,))
    ]
    classes = np.empty((height, width), np.int16)
    for strip, num_rows in strips(height, width, looks[0][0].shape[-1]):
        total = 0.0
        for found, rows, columns in looks:
            values = assemble_strip(found, rows, columns, strip, num_rows)
            total += jax.nn.softmax(values, axis=-1) if is_logits else values
        best = np.asarray(jnp.argmax(total, axis=-1), np.int16)
        classes[strip] = best[: strip.stop - strip.start, :width]
    return classes


def _look(image, maps: Maps, slide: Slide, ratio: float, is_mirrored: bool, mean, std):
    """Maps of one size's windows `[down, across, h, w, c]`, and the matrices to the image."""
    crop, stride = slide.crop_px, slide.stride_px
    size = scaled_size(*image.shape[:2], int(slide.short_side_px * ratio))
    resized = normalise(resize_bilinear(image, *size), mean, std)
    windows = cut_windows(resized[:, ::-1] if is_mirrored else resized, crop, stride)
    found = maps(windows)
    rows, columns = (
        window_matrices(side, crop, stride, grid, new)
        for side, grid, new in zip(size, found.shape[1:3], image.shape[:2], strict=True)
    )
    down = len(window_starts(size[0], crop, stride))
    # To the device once, and not for every strip.
    found = jnp.asarray(rearrange(found, "(y x) h w c -> y x h w c", y=down))
    return found, rows, columns[:, ::-1] if is_mirrored else columns


def predict_depth(
    image: np.ndarray,
    maps: Maps,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int],
    flip: bool = True,
) -> np.ndarray:
    """Depth of every pixel.

    Args:
      image: uint8 `[height, width, 3]`, as the network is to see it.
      maps: metres of whole images.
      mean, std: of the network's input.
      size: height and width wanted.
      flip: whether the mirror image has half of the say.

    Returns:
      Metres, float32 `[*size]`.
    """
    normalised = normalise(image, mean, std)
    views = [normalised, normalised[:, ::-1]] if flip else [normalised]
    found = jnp.asarray(maps(np.stack(views)))[..., None]
    found = resize_maps(found, image.shape[:2], align_corners=False)
    mean_map = (found[0] + found[1, :, ::-1]) / 2 if flip else found[0]
    return np.asarray(resize_maps(mean_map[None], size, align_corners=False)[0, ..., 0])
