"""Charts of a classification, drawn by Pillow: the confusion matrix, and a bar for each class."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov2_jax.evals.scores import confusion_counts, per_class_accuracy
from dinov2_jax.visualize.sheets import (
    BACKGROUND,
    FAINT,
    INK,
    LINE_PX,
    MARGIN_PX,
    TEXT_PX,
    Cell,
    Sheet,
)

CONFUSION_FILE, BARS_FILE = "confusion.png", "per_class.png"
MAX_NAMED = 60  # classes; of more, the matrix has no names and the bars are the best and worst
MAX_DRAWN = 1000  # classes of a matrix, a pixel each
_MATRIX_PX, _BAR_PX, _NAME_PX = 720, 420, 190
_RIGHT, _WRONG = np.array([38, 110, 70]), np.array([190, 60, 30])


def class_sheets(
    predicted: np.ndarray, labels: np.ndarray, names: Sequence[str], *, title: str
) -> dict[str, Sheet]:
    """A bar for each class, and of at most `MAX_DRAWN` the confusion, by their files' names.

    Args:
      predicted: classes `[rows]`.
      labels: of them.
      names: of the classes.
      title: of both.
    """
    accuracy, counts = per_class_accuracy(predicted, labels, len(names))
    bars = bars_sheet(accuracy, counts, names, what="Share right", title=title)
    if len(names) > MAX_DRAWN:
        return {BARS_FILE: bars}
    confusion = confusion_counts(predicted, labels, len(names))
    matrix = Sheet(
        title=f"{title}: confusion",
        caption=(
            "Row: the class of the image. Column: the class predicted, in the same order. A row "
            "sums to one; green on the diagonal is right, red is wrong, white is never."
        ),
        cells=[Cell(draw_confusion(confusion, names))],
    )
    return {BARS_FILE: bars, CONFUSION_FILE: matrix}


def bars_sheet(
    values: np.ndarray,
    counts: np.ndarray,
    names: Sequence[str],
    *,
    what: str,
    of: str = "images",
    title: str,
) -> Sheet:
    """`draw_bars` with its title, and a caption that says `what` it shows `of` what."""
    caption = f"{what} of each class, and its number of {of}. The line is the mean."
    return Sheet(f"{title}: per class", caption, [Cell(draw_bars(values, counts, names))])


def draw_confusion(confusion: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The matrix, each row divided by its sum; names stand beside at most `MAX_NAMED` rows."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # The square root makes single confusions of a hundred images visible.
    strength = np.sqrt(shares)[..., None]
    hue = np.where(np.eye(len(confusion), dtype=bool)[..., None], _RIGHT, _WRONG)
    pixels = np.round(np.array(BACKGROUND) * (1 - strength) + hue * strength).astype(np.uint8)
    cell = max(_MATRIX_PX // len(confusion), 1)
    matrix = Image.fromarray(pixels.repeat(cell, axis=0).repeat(cell, axis=1))
    if len(confusion) > MAX_NAMED or cell < LINE_PX // 2:
        return matrix
    canvas = Image.new("RGB", (matrix.width + _NAME_PX, matrix.height), BACKGROUND)
    canvas.paste(matrix, (_NAME_PX, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(min(TEXT_PX, cell))
    for row, name in enumerate(names):
        at = (_NAME_PX - MARGIN_PX // 2, row * cell + cell / 2)
        draw.text(at, _cut(name, draw, font), INK, font, anchor="rm")
    return canvas


def draw_bars(values: np.ndarray, counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """A bar for each class with images, the best first; of many the best and the worst.

    Args:
      values: in [0, 1] `[classes]`; what stands for classes without images does not count.
      counts: images `[classes]`.
      names: of the classes; beyond `MAX_NAMED` those in the middle are left out.
    """
    order = [i for i in np.argsort(-values, kind="stable") if counts[i]]
    shown = order
    if len(order) > MAX_NAMED:
        shown = [*order[: MAX_NAMED // 2], *order[-MAX_NAMED // 2 :]]
    canvas = Image.new("RGB", (_NAME_PX + _BAR_PX + 100, len(shown) * LINE_PX), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT_PX)
    for row, i in enumerate(shown):
        top, middle = row * LINE_PX, row * LINE_PX + LINE_PX / 2
        length = round(_BAR_PX * values[i])
        draw.rectangle((_NAME_PX, top + 2, _NAME_PX + length, top + LINE_PX - 3), tuple(_RIGHT))
        left = (_NAME_PX - MARGIN_PX // 2, middle)
        draw.text(left, _cut(names[i], draw, font), INK, font, anchor="rm")
        text = f"{100 * values[i]:.1f} % of {counts[i]}"
        draw.text((_NAME_PX + length + 6, middle), text, FAINT, font, anchor="lm")
    mean = _NAME_PX + round(_BAR_PX * float(values[order].mean()))
    draw.line((mean, 0, mean, canvas.height), FAINT)
    return canvas


def _cut(name: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont) -> str:
    while draw.textlength(name, font) > _NAME_PX - MARGIN_PX:
        name = name[:-2].rstrip(".") + "."
    return name
