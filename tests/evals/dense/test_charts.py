"""Sheets: colours that differ, names that explain them, pictures in their places."""

import numpy as np

from dinov2_jax.evals.dense.charts import (
    Example,
    class_colors,
    depth_colors,
    depth_sheet,
    mask_sheets,
    overlay_sheet,
)
from dinov2_jax.visualize.sheets import save


def example(truth, predicted, name="one"):
    return Example(name, np.full((*truth.shape, 3), 90, np.uint8), truth, predicted)


def test_colors_of_classes_differ():
    for count in (2, 21, 150):
        colors = class_colors(count).astype(int)
        assert len({tuple(color) for color in colors.tolist()}) == count
        nearest = np.abs(colors[:11, None] - colors[None, :11]).sum(axis=-1)
        assert nearest[~np.eye(len(nearest), dtype=bool)].min() > 40


def test_overlays_show_truth_and_prediction(tmp_path):
    truth = np.zeros((20, 30), np.int16)
    truth[:, 15:], truth[0] = 2, -1
    sheet = overlay_sheet([example(truth, np.ones_like(truth))], ["a", "b", "c"], title="T")
    tile = np.asarray(sheet.cells[0].image).astype(int)
    width = (tile.shape[1] - 8) // 3
    middles = [tile[tile.shape[0] // 2, start + width // 4] for start in (0, width + 4)]
    colors = class_colors(3)
    np.testing.assert_array_equal(middles[0], [90, 90, 90])
    np.testing.assert_allclose(middles[1], 0.6 * colors[0] + 0.4 * 90, atol=1)
    np.testing.assert_array_equal(tile[0, width + 8], [90, 90, 90])  # without a class
    third = tile[tile.shape[0] // 2, 2 * width + 20]
    np.testing.assert_allclose(third, 0.6 * colors[1] + 0.4 * 90, atol=1)
    assert len(sheet.cells) == 2  # and the names
    save(sheet, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_near_is_brighter_than_far():
    colors = depth_colors(np.linspace(1, 9, 50)[None], 1.0, 9.0).astype(int).sum(axis=-1)[0]
    assert (np.diff(colors) < 0).all()
    # Out of range is the end of the range.
    np.testing.assert_array_equal(depth_colors(np.array([[0.5, 99]]), 1.0, 9.0)[0, 1], [0, 0, 4])


def test_depth_sheets_leave_out_what_was_not_measured(tmp_path):
    truth = np.linspace(1, 5, 600).reshape(20, 30).astype(np.float32)
    truth[:, :3] = 0
    sheet = depth_sheet([example(truth, truth + 0.2)], title="T")
    tile = np.asarray(sheet.cells[0].image).astype(int)
    width = (tile.shape[1] - 12) // 4
    there = truth[truth > 0]
    assert sheet.cells[0].name == "one: {:.1f} to {:.1f} m".format(*np.percentile(there, [1, 99]))
    y = tile.shape[0] // 2
    np.testing.assert_array_equal(tile[y, width + 8], [128] * 3)
    np.testing.assert_array_equal(tile[y, 3 * width + 20], [128] * 3)
    assert (tile[y, 2 * width + 12] != 128).any()
    nothing = depth_sheet([example(np.zeros((4, 5)), np.ones((4, 5)))], title="T")
    save(nothing, tmp_path / "x.png")


def test_bars_are_of_the_classes_that_are_there(tmp_path):
    counts = np.array([[30, 10, 0], [0, 40, 0], [0, 0, 0]])
    examples = [example(*np.zeros((2, 20, 30), np.int16))]
    sheets = mask_sheets(examples, counts, ["a", "b", "c"], title="T")
    assert list(sheets) == ["predictions.png", "per_class.png", "confusion.png"]
    bars = np.asarray(sheets["per_class.png"].cells[0].image).astype(int)
    lines = np.split(bars, 2)  # b, then a; nothing of c
    lengths = [(line[len(line) // 2] == (38, 110, 70)).all(axis=-1).sum() for line in lines]
    np.testing.assert_allclose(lengths, [420 * 40 / 50, 420 * 30 / 40], atol=3)
    for file, sheet in sheets.items():
        save(sheet, tmp_path / file)
        assert (tmp_path / file).stat().st_size > 500
