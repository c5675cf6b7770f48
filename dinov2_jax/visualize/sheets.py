"""A sheet of pictures with title, names and caption, as one PNG or one HTML file.

Drawing is Pillow's alone. The HTML holds its pictures as data URIs and needs nothing else: no
script, no other file, no network.
"""

import base64
import dataclasses
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from dinov2_jax.storage import write_whole

BACKGROUND, INK, FAINT = (255, 255, 255), (30, 30, 30), (110, 110, 110)
GAP_PX, MARGIN_PX = 4, 16
TEXT_PX, TITLE_PX, LINE_PX = 13, 18, 17
SUFFIXES = (".png", ".html")
_STYLE = """
body { font: 15px/1.45 sans-serif; color: #1e1e1e; margin: 2em auto; max-width: 1400px;
  padding: 0 1em; }
p, figcaption { color: #555; max-width: 60em; }
main { display: flex; flex-wrap: wrap; gap: 1.2em; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
""".strip()


class Cell(NamedTuple):
    """One picture of a sheet."""

    image: Image.Image
    name: str = ""  # stands below it


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Pictures in reading order.

    Attributes:
      title: of the sheet.
      caption: how to read it, a few sentences.
      cells: the pictures.
      headers: (text, left edge in px) of the columns within a cell.
      width_px: about, of the PNG; it sets how many cells stand in a row.
    """

    title: str
    caption: str
    cells: Sequence[Cell]
    headers: Sequence[tuple[str, int]] = ()
    width_px: int = 1320

    def draw(self) -> Image.Image:
        """The sheet as one RGB image."""
        cells = [named(image, name) if name else image for image, name in self.cells]
        cell_width = max(cell.width for cell in cells)
        per_row = max(1, self.width_px // (cell_width + MARGIN_PX))
        rows = [_padded(cells[i : i + per_row], cell_width) for i in range(0, len(cells), per_row)]
        body = below([beside(row, MARGIN_PX) for row in rows], 2 * GAP_PX)
        font = ImageFont.load_default(TEXT_PX)
        lines = _wrapped(self.caption, body.width, font)
        top = MARGIN_PX + TITLE_PX + (2 if self.headers else 1) * LINE_PX
        bottom = top + body.height + LINE_PX // 2
        size = (body.width + 2 * MARGIN_PX, bottom + len(lines) * LINE_PX + MARGIN_PX)
        canvas = Image.new("RGB", size, BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        draw.text((MARGIN_PX, MARGIN_PX // 2), self.title, INK, ImageFont.load_default(TITLE_PX))
        for column in range(len(rows[0])):
            for text, left in self.headers:
                left += MARGIN_PX + column * (cell_width + MARGIN_PX)
                draw.text((left, top - LINE_PX - 1), text, INK, font)
        canvas.paste(body, (MARGIN_PX, top))
        for i, line in enumerate(lines):
            draw.text((MARGIN_PX, bottom + i * LINE_PX), line, FAINT, font)
        return canvas

    def to_html(self) -> str:
        """The sheet as a page that needs no other file."""
        caption = self.caption
        if self.headers:
            columns = ", ".join(text for text, _ in self.headers)
            caption = f"From left to right: {columns}. {caption}"
        title, caption = html.escape(self.title), html.escape(caption)
        figures = []
        for image, name in self.cells:
            data = base64.b64encode(png(image)).decode()
            name = html.escape(name)
            figures.append(
                f'<figure><img alt="{name or title}" width="{image.width}" '
                f'src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
            )
        return (
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
            f"\n<style>\n{_STYLE}\n</style></head>\n<body><h1>{title}</h1>\n<p>{caption}</p>\n"
            "<main>\n" + "\n".join(figures) + "\n</main></body></html>\n"
        )


def save(sheet: Sheet, path: epath.PathLike) -> None:
    """Writes a sheet as its suffix says, so that it is there whole or not at all.

    Raises:
      ValueError: a suffix that is none of `SUFFIXES`.
    """
    path = checked_target(path)
    data = png(sheet.draw()) if path.suffix == ".png" else sheet.to_html().encode()
    write_whole(path, data)


def checked_target(path: epath.PathLike) -> epath.Path:
    """Where a sheet may go. Raises ValueError for a wrong suffix, or a folder that is not there."""
    path = epath.Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}, which says what is written")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} is not there; create it, or choose another")
    return path


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def rgb(images: np.ndarray) -> np.ndarray:
    """uint8 `[..., c]` -> `[..., 3]`: grey repeated, channels beyond three left out."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].repeat(3, axis=-1)


def zoomed(image: np.ndarray, width_px: int, method: Image.Resampling) -> Image.Image:
    """uint8 `[height, width, 3]` at another width, its aspect kept."""
    height, width = image.shape[:2]
    size = (width_px, max(round(height * width_px / width), 1))
    return Image.fromarray(image).resize(size, method)


def photo_tile(pixels: np.ndarray, width_px: int) -> Image.Image:
    """A photo uint8 `[height, width, c]` for a sheet."""
    return zoomed(rgb(pixels), width_px, Image.Resampling.BICUBIC)


def beside(images: Sequence[Image.Image], gap_px: int = GAP_PX) -> Image.Image:
    """Pictures in a row, their tops level."""
    size = (sum(x.width + gap_px for x in images) - gap_px, max(x.height for x in images))
    canvas, left = Image.new("RGB", size, BACKGROUND), 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + gap_px
    return canvas


def below(images: Sequence[Image.Image], gap_px: int = GAP_PX) -> Image.Image:
    """Pictures in a column, their left edges level."""
    size = (max(x.width for x in images), sum(x.height + gap_px for x in images) - gap_px)
    canvas, top = Image.new("RGB", size, BACKGROUND), 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height + gap_px
    return canvas


def named(image: Image.Image, name: str, *, ink: tuple[int, int, int] = FAINT) -> Image.Image:
    """The picture with a name below it, cut to its width."""
    canvas = Image.new("RGB", (image.width, image.height + LINE_PX), BACKGROUND)
    canvas.paste(image, (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT_PX)
    while draw.textlength(name, font) > image.width:
        shorter = name[:-2].rstrip(".")
        name = shorter and f"{shorter}."  # on a tile of a few pixels nothing is left
    draw.text((0, image.height), name, ink, font)
    return canvas


def _padded(row: Sequence[Image.Image], width_px: int) -> list[Image.Image]:
    """Cells of one width, so that columns are level."""
    canvases = [Image.new("RGB", (width_px, cell.height), BACKGROUND) for cell in row]
    for canvas, cell in zip(canvases, row, strict=True):
        canvas.paste(cell, (0, 0))
    return canvases


def _wrapped(text: str, width_px: int, font) -> list[str]:
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if measure.textlength(longer, font) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
