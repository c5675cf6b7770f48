"""Where CLS looks: its attention to the patches, head by head, over the photo."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dinov2_jax.model import Model
from dinov2_jax.visualize.patches import normalized
from dinov2_jax.visualize.photos import Photo
from dinov2_jax.visualize.sheets import INK, Cell, Sheet, below, beside, named, photo_tile

# Dark to bright through purple and orange: brightness rises evenly, so it reads in grey too.
_HEAT = np.array([[0, 0, 10], [80, 18, 110], [180, 50, 90], [245, 125, 20], [250, 250, 150]])
_TILES_PER_ROW = 8


def attention_maps(
    model: Model, photos: Sequence[Photo], *, block: int | None = None
) -> list[np.ndarray]:
    """Attention of CLS to the patches; to itself and to registers it is left out.

    Args:
      model: of `dinov2_jax.load`.
      photos: sides must be multiples of the patch.
      block: counted from 0; None: the last.

    Returns:
      float32 `[heads, h, w]` of each photo; a head's sum is the share that patches get.

    Raises:
      ValueError: attention that is not finite, or a block that does not exist.
    """
    maps = []
    for photo in photos:
        probs = np.asarray(model.cls_attention(normalized(model, photo), block)[0])
        if not np.isfinite(probs).all():
            raise ValueError(
                f"attention must be finite, that of {photo.name} is not; the network has diverged, "
                "or its file is damaged"
            )
        h, w = model.grid(*photo.pixels.shape[:2])
        to_patches = probs[:, 1 + model.spec.num_register_tokens :]
        maps.append(to_patches.reshape(len(probs), h, w))
    return maps


def attention_sheet(
    photos: Sequence[Photo], maps: Sequence[np.ndarray], *, block: int, tile_px: int = 160
) -> Sheet:
    """Draws each photo, the mean of its heads, and each head.

    Args:
      photos: as the network saw them.
      maps: `[heads, h, w]` of each, see `attention_maps`.
      block: for the title.
      tile_px: width of a tile.
    """
    cells = []
    for photo, heads in zip(photos, maps, strict=True):
        tiles = [named(photo_tile(photo.pixels, tile_px), photo.name, ink=INK)]
        titles = ["mean", *(f"head {i}" for i in range(len(heads)))]
        for title, heat in zip(titles, [heads.mean(axis=0), *heads], strict=True):
            title = f"{title}: {heat.sum():.0%}"
            tiles.append(named(heat_tile(photo.pixels, heat, tile_px), title))
        rows = [tiles[i : i + _TILES_PER_ROW] for i in range(0, len(tiles), _TILES_PER_ROW)]
        cells.append(Cell(below([beside(row) for row in rows])))
    caption = (
        "How much CLS attends to each patch, interpolated between the patches' centres. Each tile "
        "is scaled to its own largest value. Percentages: of the head's attention, what patches "
        "get; the rest goes to CLS itself and to registers."
    )
    return Sheet(f"Attention of CLS in block {block}", caption, cells, width_px=0)


def heat_tile(pixels: np.ndarray, heat: np.ndarray, tile_px: int) -> Image.Image:
    """A map `[h, w]`, at least 0, as colours over the photo in grey."""
    photo = photo_tile(pixels, tile_px).convert("L")
    smooth = Image.fromarray(heat.astype(np.float32)).resize(photo.size, Image.Resampling.BILINEAR)
    unit = np.asarray(smooth) / max(heat.max(), np.finfo(np.float32).tiny)
    levels = np.linspace(0, 1, len(_HEAT))
    heat_rgb = np.stack([np.interp(unit, levels, channel) for channel in _HEAT.T], axis=-1)
    mixed = 0.7 * heat_rgb + 0.3 * np.asarray(photo)[..., None]
    return Image.fromarray(mixed.round().astype(np.uint8))
