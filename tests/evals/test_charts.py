"""What stands in the charts: colours where they belong, and sizes."""

import numpy as np
import pytest

from dinov2_jax.evals.charts import (
    BARS_FILE,
    CONFUSION_FILE,
    MAX_DRAWN,
    MAX_NAMED,
    class_sheets,
    draw_bars,
    draw_confusion,
)


def test_the_diagonal_is_green_and_what_is_wrong_red():
    confusion = np.array([[8, 0], [3, 1]])
    pixels = np.asarray(draw_confusion(confusion, ["cat", "dog"]).convert("RGB")).astype(int)
    matrix = pixels[:, -720:]
    right, never, wrong = matrix[180, 180], matrix[180, 540], matrix[540, 180]
    assert right[1] > right[0] and right[1] > right[2]
    assert wrong[0] > wrong[1] and wrong[0] > wrong[2]
    assert (never == 255).all()
    assert pixels.shape[1] > 720 and (pixels[:, :-720] < 100).any()  # the names


def test_many_classes_have_no_names():
    count = MAX_NAMED + 1
    image = draw_confusion(np.eye(count, dtype=int), [str(i) for i in range(count)])
    assert image.width == image.height == 720 // count * count
    assert draw_confusion(np.eye(1000, dtype=int), [""] * 1000).size == (1000, 1000)


@pytest.mark.parametrize(("count", "rows"), [(3, 2), (MAX_NAMED + 20, MAX_NAMED)])
def test_a_bar_for_each_class_with_images(count, rows):
    counts = np.arange(count) % 5 + 1
    counts[1] = 0 if count == 3 else 1
    names = [f"a name that is much too long to be shown whole {i}" for i in range(count)]
    image = draw_bars(np.where(counts, 0.5, np.nan), counts, names)
    assert image.height == rows * draw_bars(np.ones(1), np.ones(1, int), ["x"]).height


def test_longer_bars_are_better():
    pixels = np.asarray(draw_bars(np.array([0.25, 1]), np.array([4, 4]), ["a", "b"])).astype(int)
    is_bar = (pixels[..., 1] - pixels[..., 0] > 40) & (pixels[..., 1] < 160)
    height = len(pixels) // 2
    best, worst = is_bar[height // 2].sum(), is_bar[height + height // 2].sum()
    assert best == pytest.approx(4 * worst, abs=4)


def test_two_sheets_and_of_very_many_classes_no_matrix():
    for count, files in ((3, [BARS_FILE, CONFUSION_FILE]), (MAX_DRAWN + 1, [BARS_FILE])):
        labels = np.arange(count)
        found = class_sheets(labels, labels, [str(i) for i in labels], title="knn")
        assert list(found) == files and all(sheet.draw().width > 600 for sheet in found.values())
