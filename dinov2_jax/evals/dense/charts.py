"""Sheets of predictions: classes over photographs and in numbers, depth maps beside photographs."""

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov2_jax.evals.charts import BARS_FILE, CONFUSION_FILE, bars_sheet, draw_confusion
from dinov2_jax.evals.dense.mask_sets import IGNORED
from dinov2_jax.evals.dense.metrics import iou
from dinov2_jax.visualize.sheets import (
    BACKGROUND,
    INK,
    LINE_PX,
    TEXT_PX,
    Cell,
    Sheet,
    beside,
    photo_tile,
    zoomed,
)

SHEET_FILE = "predictions.png"
_TILE_PX, _OVERLAY = 280, 0.6
# Near to far: bright and warm to dark; brightness falls evenly, so it reads in grey too.
_DEPTH_COLORS = np.array(
    [[252, 253, 191], [254, 159, 109], [222, 73, 104], [140, 41, 129], [59, 15, 112], [0, 0, 4]]
)


class Example(NamedTuple):
    """An image with what is there and what was predicted, `[height, width]` each."""

    name: str
    image: np.ndarray  # uint8 [height, width, 3]
    truth: np.ndarray
    predicted: np.ndarray


def class_colors(num_classes: int) -> np.ndarray:
    """A colour of each class, uint8 `[num_classes, 3]`: hues by the golden ratio, so all differ."""
    colors = [
        colorsys.hsv_to_rgb(i * 0.61803398875 % 1, 0.6 + 0.2 * (i // 2 % 3), 1 - 0.18 * (i % 3))
        for i in range(num_classes)
    ]
    return np.rint(255 * np.array(colors)).astype(np.uint8)


def overlay_sheet(examples: Sequence[Example], class_names: Sequence[str], *, title: str) -> Sheet:
    """Photo, truth and prediction of each example; classes that occur are explained below them."""
    colors = class_colors(len(class_names))
    cells = []
    for name, image, truth, predicted in examples:
        tiles = [photo_tile(image, _TILE_PX)]
        for classes in (truth, predicted):
            tiles.append(zoomed(_overlaid(image, classes, colors), _TILE_PX, _NEAREST))
        cells.append(Cell(beside(tiles), name))
    occurring = sorted(
        set(np.concatenate([np.unique(x) for e in examples for x in e[2:]]).tolist()) - {IGNORED}
    )
    cells.append(Cell(_legend([(class_names[i], colors[i]) for i in occurring], cells[0][0].width)))
    caption = "Pixels without a class stay grey in the truth; the prediction has a class for each."
    return Sheet(title, caption, cells, headers=_headers("photo", "truth", "prediction"))


def mask_sheets(
    examples: Sequence[Example], counts: np.ndarray, class_names: Sequence[str], *, title: str
) -> dict[str, Sheet]:
    """`overlay_sheet`, a bar for each class, and the confusion of pixels, by their files' names.

    Args:
      examples: at least one.
      counts: of `metrics.confusion`.
      class_names: of its rows.
      title: of all.
    """
    bars = bars_sheet(
        iou(counts),
        counts.sum(axis=1),
        class_names,
        what="Intersection over union",
        of="pixels",
        title=title,
    )
    matrix_caption = (
        "Row: the class of the pixel. Column: the class predicted, in the same order. A row sums "
        "to one; green on the diagonal is right, red is wrong, white is never."
    )
    matrix = Cell(draw_confusion(counts, class_names))
    return {
        SHEET_FILE: overlay_sheet(examples, class_names, title=title),
        BARS_FILE: bars,
        CONFUSION_FILE: Sheet(f"{title}: confusion", matrix_caption, [matrix]),
    }


def depth_sheet(examples: Sequence[Example], *, title: str) -> Sheet:
    """Photo, truth, prediction and error of each example, in the colours of one range each."""
    cells = []
    for name, image, truth, predicted in examples:
        there = truth[truth > 0]
        low, high = np.percentile(there, [1, 99]) if len(there) else (0.0, 1.0)
        error = np.where(truth > 0, np.abs(predicted - truth), 0)
        tiles = [photo_tile(image, _TILE_PX)]
        for values, span in ((truth, (low, high)), (predicted, (low, high)), (error, (1.0, 0.0))):
            colored = depth_colors(values, *span)
            colored[truth == 0] = colored[truth == 0] if values is predicted else 128
            tiles.append(zoomed(colored, _TILE_PX, _NEAREST))
        cells.append(Cell(beside(tiles), f"{name}: {low:.1f} to {high:.1f} m"))
    caption = (
        "Bright is near, dark is far, over the range below each row. The error is dark where there "
        "is none and white from 1 m on. Grey: nothing was measured."
    )
    headers = _headers("photo", "truth", "prediction", "error")
    return Sheet(title, caption, cells, headers=headers, width_px=0)


def depth_colors(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Metres `[height, width]` as colours, uint8 `[height, width, 3]`."""
    share = np.clip((depth - near) / (far - near if far != near else 1), 0, 1)
    levels = np.linspace(0, 1, len(_DEPTH_COLORS))
    channels = [np.interp(share, levels, channel) for channel in _DEPTH_COLORS.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


_NEAREST = Image.Resampling.NEAREST


def _overlaid(image: np.ndarray, classes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    grey = image.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    mixed = _OVERLAY * colors[np.maximum(classes, 0)] + (1 - _OVERLAY) * grey
    return np.where((classes == IGNORED)[..., None], grey, mixed).round().astype(np.uint8)


def _headers(*texts: str) -> list[tuple[str, int]]:
    return [(text, i * (_TILE_PX + 4)) for i, text in enumerate(texts)]


def _legend(entries: Sequence[tuple[str, np.ndarray]], width_px: int) -> Image.Image:
    """Names beside squares of their colours, in lines of the width."""
    font = ImageFont.load_default(TEXT_PX)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, left, line = [], 0, 0
    for name, color in entries:
        length = int(measure.textlength(name, font)) + 2 * LINE_PX
        if left and left + length > width_px:
            left, line = 0, line + 1
        places.append((name, tuple(map(int, color)), left, line * LINE_PX))
        left += length
    canvas = Image.new("RGB", (width_px, (line + 1) * LINE_PX), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for name, color, x, y in places:
        draw.rectangle((x, y + 2, x + LINE_PX - 7, y + LINE_PX - 5), color)
        draw.text((x + LINE_PX - 2, y), name, INK, font)
    return canvas
