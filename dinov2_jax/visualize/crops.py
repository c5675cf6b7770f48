"""What the network sees in training: crops as the step augments and masks them, as a sheet."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from einops import rearrange
from PIL import Image

from dinov2_jax.data.batch import Batch
from dinov2_jax.visualize.sheets import MARGIN_PX, Cell, Sheet, below, beside, rgb, zoomed

_HIDDEN_LEVELS = (160, 128)  # stripes of masked patches
_CROP_PX = 140  # about the width of a global crop


def crops_sheet(
    batch: Batch,
    *,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    num_images: int = 6,
) -> Sheet:
    """Draws the first images of a batch as the network gets them, one row each.

    Args:
      batch: of the pipeline.
      augment: (uint8 crops, parameters) -> normalised crops: the step's.
      mean, std: of the normalisation, undone for the eye.
      patch_size: px; masked patches of the student's global crops are striped grey.
      num_images: rows.

    Returns:
      A sheet, some 1000 px wide.
    """
    num_images = min(num_images, len(batch.global_crops))

    def seen(crops: np.ndarray, params: np.ndarray) -> np.ndarray:
        """uint8 RGB [images, crops, height, width, 3]."""
        crops, params = crops[:num_images], params[:num_images]
        flat = [rearrange(x, "b v ... -> (b v) ...") for x in (crops, params)]
        levels = np.asarray(jax.jit(augment)(*flat), np.float32) * np.array(std) + np.array(mean)
        levels = rearrange(levels, "(b v) ... -> b v ...", b=num_images)
        return rgb(np.clip(255 * levels, 0, 255).round().astype(np.uint8))

    global_crops = seen(batch.global_crops, batch.global_augment)
    num_global, height, width = global_crops.shape[1:4]
    masks = masks_of_images(batch.masks, num_global=num_global)[:num_images]
    masks = rearrange(masks, "b g (h w) -> b g h w", h=height // patch_size)
    masks = masks.repeat(patch_size, axis=-2).repeat(patch_size, axis=-1)
    row, column = np.mgrid[:height, :width]
    stripes = np.where((row + column) % 8 < 2, *_HIDDEN_LEVELS)[..., None]  # no photo looks so
    masked = np.where(masks[..., None], stripes, global_crops).astype(np.uint8)

    zoom = max(1, round(_CROP_PX / height))  # by nearest neighbour: each pixel as it is
    strips = [(f"teacher: {num_global} global crops", _strips(global_crops, zoom))]
    if batch.masks.any():
        strips.append(("student: the same, masked", _strips(masked, zoom)))
    if batch.local_crops.shape[1]:
        local_crops = seen(batch.local_crops, batch.local_augment)
        per_column = max(1, round(height / local_crops.shape[2]))
        title = f"student: {local_crops.shape[1]} local crops"
        strips.append((title, _strips(local_crops, zoom, per_column=per_column)))
    rows = [Cell(beside([strip[i] for _, strip in strips], MARGIN_PX)) for i in range(num_images)]
    lefts = np.cumsum([0, *(strip[0].width + MARGIN_PX for _, strip in strips)])
    headers = [(title, int(x)) for (title, _), x in zip(strips, lefts, strict=False)]
    share = batch.masks.mean()
    caption = (
        f"Each row is one image after cropping, flipping and colour augmentation. Global crops "
        f"are {width} x {height} px, patches {patch_size} px; everything is drawn at the same "
        f"scale ({zoom}x). Striped patches are hidden from the student, who must predict what the "
        f"teacher says there: {share:.0%} of all patches in this batch."
    )
    return Sheet("What the network sees", caption, rows, headers, width_px=rows[0].image.width)


def masks_of_images(masks: np.ndarray, *, num_global: int) -> np.ndarray:
    """Undoes the pooling of a group's crops: bool `[s, g * q, n]` -> `[b, g, n]`."""
    return rearrange(masks, "s (g q) n -> (s q) g n", g=num_global)


def _strips(crops: np.ndarray, zoom: int, *, per_column: int = 1) -> list[Image.Image]:
    """One picture per image: its crops `[images, crops, h, w, 3]`, column by column."""
    strips = []
    for row in crops:
        tiles = [zoomed(x, x.shape[1] * zoom, Image.Resampling.NEAREST) for x in row]
        columns = [tiles[i : i + per_column] for i in range(0, len(tiles), per_column)]
        strips.append(beside([below(column) for column in columns]))
    return strips
