"""Pictures that a run leaves in its workdir: what the network sees, and what it makes of photos.

In: a batch and the step's own augmentation; photos and their patch features. Out: Pillow images.
Drawing is Pillow's alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from dinov2_jax.data.batch import Batch
from dinov2_jax.data.image_ops import decode, resize_center_crop
from dinov2_jax.data.records import BadImage, Source

_BACKGROUND, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (110, 110, 110)
_HIDDEN_LEVELS = (160, 128)  # stripes of masked patches
_GAP_PX, _MARGIN_PX = 4, 16
_TEXT_PX, _TITLE_PX, _LINE_PX = 13, 18, 17
_TILE_PX = 140  # about the width of a global crop or a photo


def crops_sheet(
    batch: Batch,
    *,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    num_images: int = 6,
) -> Image.Image:
    """Draws the first images of a batch as the network gets them, one row each.

    Args:
      batch: of the pipeline.
      augment: (uint8 crops, parameters) -> normalised crops: the step's.
      mean, std: of the normalisation, undone for the eye.
      patch_size: px; masked patches of the student's global crops are striped grey.
      num_images: rows.

    Returns:
      An RGB image, some 1000 px wide.
    """
    num_images = min(num_images, len(batch.global_crops))

    def seen(crops: np.ndarray, params: np.ndarray) -> np.ndarray:
        """uint8 RGB [images, crops, height, width, 3]."""
        crops, params = crops[:num_images], params[:num_images]
        flat = [rearrange(x, "b v ... -> (b v) ...") for x in (crops, params)]
        levels = np.asarray(jax.jit(augment)(*flat), np.float32) * np.array(std) + np.array(mean)
        levels = rearrange(levels, "(b v) ... -> b v ...", b=num_images)
        return _rgb(np.clip(255 * levels, 0, 255).round().astype(np.uint8))

    global_crops = seen(batch.global_crops, batch.global_augment)
    num_global, height, width = global_crops.shape[1:4]
    masks = masks_of_images(batch.masks, num_global=num_global)[:num_images]
    masks = rearrange(masks, "b g (h w) -> b g h w", h=height // patch_size)
    masks = masks.repeat(patch_size, axis=-2).repeat(patch_size, axis=-1)
    row, column = np.mgrid[:height, :width]
    stripes = np.where((row + column) % 8 < 2, *_HIDDEN_LEVELS)[..., None]  # no photo looks so
    masked = np.where(masks[..., None], stripes, global_crops).astype(np.uint8)

    zoom = max(1, round(_TILE_PX / height))  # by nearest neighbour: each pixel as it is
    strips = [(f"teacher: {num_global} global crops", _strips(global_crops, zoom))]
    if batch.masks.any():
        strips.append(("student: the same, masked", _strips(masked, zoom)))
    if batch.local_crops.shape[1]:
        local_crops = seen(batch.local_crops, batch.local_augment)
        per_column = max(1, round(height / local_crops.shape[2]))
        title = f"student: {local_crops.shape[1]} local crops"
        strips.append((title, _strips(local_crops, zoom, per_column=per_column)))
    rows = [_beside([strip[i] for _, strip in strips], _MARGIN_PX) for i in range(num_images)]
    lefts = np.cumsum([0, *(strip[0].width + _MARGIN_PX for _, strip in strips)])
    headers = [(title, int(x)) for (title, _), x in zip(strips, lefts, strict=False)]
    share = batch.masks.mean()
    caption = (
        f"Each row is one image after cropping, flipping and colour augmentation. Global crops "
        f"are {width} x {height} px, patches {patch_size} px; everything is drawn at the same "
        f"scale ({zoom}x). Striped patches are hidden from the student, who must predict what the "
        f"teacher says there: {share:.0%} of all patches in this batch."
    )
    return _sheet("What the network sees", headers, _below(rows, 2 * _GAP_PX), caption)


def masks_of_images(masks: np.ndarray, *, num_global: int) -> np.ndarray:
    """Undoes the pooling of a group's crops: bool `[s, g * q, n]` -> `[b, g, n]`."""
    return rearrange(masks, "s (g q) n -> (s q) g n", g=num_global)


def sample_photos(
    source: Source,
    *,
    size_px: int,
    num_photos: int = 12,
    num_channels: int = 3,
    max_image_pixels: int = 200_000_000,
) -> tuple[list[np.ndarray], list[str]]:
    """Photos for `pca_sheet`, evenly spaced in the source; unreadable ones are passed over.

    Args:
      source: of photos.
      size_px: short side, and both sides of the centred square; a multiple of the patch.
      num_photos: at most.
      num_channels: 1, 3 or 4.
      max_image_pixels: a larger photo is passed over.

    Returns:
      Images uint8 `[size_px, size_px, c]` and their names.
    """
    photos, names = [], []
    count = min(num_photos, len(source))
    for i in (len(source) * np.arange(count) // max(count, 1)).tolist():
        try:
            image = decode(source[i].image, num_channels=num_channels, max_pixels=max_image_pixels)
        except BadImage:
            continue
        photos.append(resize_center_crop(image, size_px, size_px))
        names.append(source.name(i))
    return photos, names


def pca_sheet(
    photos: Sequence[np.ndarray],
    names: Sequence[str],
    patches: Mapping[str, np.ndarray],
    *,
    tile_px: int = _TILE_PX,
    width_px: int = 1320,
) -> Image.Image:
    """Draws each photo beside its patch features, whose first three principal components are RGB.

    Args:
      photos: uint8 `[height, width, c]`.
      names: of the photos.
      patches: features `[photos, n, d]` by a title such as "trained" or "before training": a
        column each. The photos' patches are those of a square grid.
      tile_px: width of a photo.
      width_px: of the sheet, about; it sets how many photos stand in a row.

    Returns:
      An RGB image.

    Raises:
      ValueError: a feature is not finite.
    """
    colors = {title: pca_colors(features) for title, features in patches.items()}
    cells = []
    for i, (photo, name) in enumerate(zip(photos, names, strict=True)):
        tiles = [_zoomed(_rgb(photo), tile_px, Image.Resampling.BICUBIC)]
        for of_photos in colors.values():
            grid = rearrange(of_photos[i], "(h w) c -> h w c", h=math.isqrt(of_photos.shape[1]))
            tiles.append(_zoomed(grid, tile_px, Image.Resampling.NEAREST))
        cells.append(_named(_beside(tiles, _GAP_PX), name))
    photos_per_row = max(1, width_px // (cells[0].width + _MARGIN_PX))
    rows = [cells[i : i + photos_per_row] for i in range(0, len(cells), photos_per_row)]
    body = _below([_beside(row, _MARGIN_PX) for row in rows], 2 * _GAP_PX)
    titles = ["photo", *patches]
    headers = [
        (title, column * (cells[0].width + _MARGIN_PX) + i * (tile_px + _GAP_PX))
        for column in range(len(rows[0]))
        for i, title in enumerate(titles)
    ]
    caption = (
        "Each square is a patch, coloured by the first three principal components of the patch "
        "features of all these photos together: like colours are like features, also across "
        "photos."
    )
    if len(colors) > 1:
        caption += " Each column has components of its own."
    return _sheet("What the patch features tell apart", headers, body, caption)


def pca_colors(patches: np.ndarray) -> np.ndarray:
    """Patch features as colours: one PCA over the patches of all photos together.

    Equal colours therefore mean similar features, across photos too. The sign of a component is
    fixed (its largest loading is positive); its 2nd to 98th percentile fill the range of a colour.

    Args:
      patches: float `[photos, n, d]`.

    Returns:
      uint8 `[photos, n, 3]`.

    Raises:
      ValueError: a feature is not finite.
    """
    if not np.isfinite(patches).all():
        raise ValueError("patch features must be finite; the network has produced NaN or infinity")
    flat = rearrange(patches, "b n d -> (b n) d").astype(np.float64)
    flat = flat - flat.mean(axis=0)
    components = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :3]  # largest first
    largest = components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])]
    scores = flat @ (components * np.where(largest < 0, -1, 1))
    low, high = np.percentile(scores, [2, 98], axis=0)
    # A component without spread (collapsed features) becomes a flat grey.
    is_flat = high - low < 1e-9
    unit = np.where(is_flat, 0.5, (scores - low) / np.where(is_flat, 1, high - low))
    rgb = np.clip(255 * unit, 0, 255).round().astype(np.uint8)
    return rearrange(rgb, "(b n) c -> b n c", b=len(patches))


def _rgb(images: np.ndarray) -> np.ndarray:
    """uint8 `[..., c]` -> `[..., 3]`: grey repeated, channels beyond three left out."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].repeat(3, axis=-1)


def _zoomed(image: np.ndarray, width_px: int, method: Image.Resampling) -> Image.Image:
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((width_px, round(height * width_px / width)), method)


def _strips(crops: np.ndarray, zoom: int, *, per_column: int = 1) -> list[Image.Image]:
    """One picture per image: its crops `[images, crops, h, w, 3]`, column by column."""
    strips = []
    for row in crops:
        tiles = [_zoomed(x, x.shape[1] * zoom, Image.Resampling.NEAREST) for x in row]
        columns = [tiles[i : i + per_column] for i in range(0, len(tiles), per_column)]
        strips.append(_beside([_below(column, _GAP_PX) for column in columns], _GAP_PX))
    return strips


def _beside(images: Sequence[Image.Image], gap_px: int) -> Image.Image:
    size = (sum(x.width + gap_px for x in images) - gap_px, max(x.height for x in images))
    canvas, left = Image.new("RGB", size, _BACKGROUND), 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + gap_px
    return canvas


def _below(images: Sequence[Image.Image], gap_px: int) -> Image.Image:
    size = (max(x.width for x in images), sum(x.height + gap_px for x in images) - gap_px)
    canvas, top = Image.new("RGB", size, _BACKGROUND), 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height + gap_px
    return canvas


def _named(image: Image.Image, name: str) -> Image.Image:
    """The picture with a name below it, cut to its width."""
    canvas = Image.new("RGB", (image.width, image.height + _LINE_PX), _BACKGROUND)
    canvas.paste(image, (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT_PX)
    while draw.textlength(name, font) > image.width:
        name = name[:-2].rstrip(".") + "."
    draw.text((0, image.height), name, _FAINT, font)
    return canvas


def _sheet(
    title: str, headers: Sequence[tuple[str, int]], body: Image.Image, caption: str
) -> Image.Image:
    """Title and column headers (text, left edge) above the body, a caption below it."""
    font = ImageFont.load_default(_TEXT_PX)
    width = body.width + 2 * _MARGIN_PX
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if measure.textlength(longer, font) <= body.width:
            lines[-1] = longer
        else:
            lines.append(word)
    top = _MARGIN_PX + _TITLE_PX + 2 * _LINE_PX
    bottom = top + body.height + _LINE_PX // 2
    height = bottom + len(lines) * _LINE_PX + _MARGIN_PX
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN_PX, _MARGIN_PX // 2), title, _INK, ImageFont.load_default(_TITLE_PX))
    for text, left in headers:
        draw.text((_MARGIN_PX + left, top - _LINE_PX - 1), text, _INK, font)
    canvas.paste(body, (_MARGIN_PX, top))
    for i, line in enumerate(lines):
        draw.text((_MARGIN_PX, bottom + i * _LINE_PX), line, _FAINT, font)
    return canvas
