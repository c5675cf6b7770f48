"""PCA colours and foregrounds of planted features, whose components are known."""

import numpy as np
import pytest

from dinov2_jax.visualize import sheets
from dinov2_jax.visualize.pca import foreground_masks, pca_colors, pca_sheet
from dinov2_jax.visualize.photos import Photo

MARGIN, GAP = sheets.MARGIN_PX, sheets.GAP_PX
TOP = MARGIN + sheets.TITLE_PX + 2 * sheets.LINE_PX


def planted_features() -> tuple[np.ndarray, np.ndarray]:
    """[3 photos, 4, 4, 7] and scores on three hidden directions, of falling strength."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((48, 3))
    scores = np.linalg.qr(scores - scores.mean(axis=0))[0]  # uncorrelated, so that PCA finds them
    scores = (scores * [30.0, 10.0, 3.0]).reshape(3, 4, 4, 3)
    directions = np.linalg.qr(rng.standard_normal((7, 7)))[0][:3]
    return scores @ directions + 5.0 + 0.01 * rng.standard_normal((3, 4, 4, 7)), scores


def colors_of(features, **settings) -> np.ndarray:
    return np.stack(pca_colors(features, **settings))


def test_colors_are_the_three_strongest_directions():
    features, scores = planted_features()
    colors = colors_of(features)
    assert colors.shape == (3, 4, 4, 3) and colors.dtype == np.uint8
    for i in range(3):
        correlation = np.corrcoef(colors[..., i].ravel(), scores[..., i].ravel())[0, 1]
        assert abs(correlation) > 0.98
        assert colors[..., i].min() == 0 and colors[..., i].max() == 255


def test_signs_are_fixed():
    """Along axes, each colour must rise with its feature: an eigenvector may come negated."""
    _, scores = planted_features()
    for axes in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        colors = colors_of(scores[..., axes])
        for i in range(3):
            assert np.corrcoef(colors[..., i].ravel(), scores[..., i].ravel())[0, 1] > 0.98


def test_one_pca_of_all_photos_whatever_their_sizes_and_order():
    features, _ = planted_features()
    features[2, 0, 3] = features[0, 2, 1]
    colors = colors_of(features)
    np.testing.assert_array_equal(colors[2, 0, 3], colors[0, 2, 1])
    order = [2, 0, 1]
    np.testing.assert_array_equal(colors_of(features[order]), colors[order])
    np.testing.assert_array_equal(colors_of(3 * features - 7), colors)
    flat = features.reshape(48, 7)
    uneven = pca_colors([flat[:6].reshape(2, 3, 7), flat[6:].reshape(6, 7, 7)])
    assert [x.shape for x in uneven] == [(2, 3, 3), (6, 7, 3)]
    np.testing.assert_array_equal(
        np.concatenate([x.reshape(-1, 3) for x in uneven]), colors.reshape(48, 3)
    )


def test_collapsed_features_are_grey_and_nan_is_an_error():
    assert (colors_of(np.full((2, 2, 2, 6), 3.0)) == 128).all()
    features, _ = planted_features()
    features[1, 2, 3, 0] = np.nan
    for draw in (pca_colors, foreground_masks):
        with pytest.raises(ValueError, match="patch features must be finite"):
            draw(features)


def photos_with_an_object(rng) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two grids, and where their objects are: one of them reaches the border."""
    masks = [np.zeros((6, 7), bool), np.zeros((5, 8), bool)]
    masks[0][2:4, 2:5] = masks[1][1:5, 3:6] = True
    direction = np.array([0, 0, 1, 0, 0])
    grids = []
    for mask in masks:
        scores = np.where(mask, 10.0, -4.0) + 0.5 * rng.standard_normal(mask.shape)
        grids.append(scores[..., None] * direction + rng.standard_normal((*mask.shape, 5)))
    return grids, masks


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shift", [0, 100])
def test_the_foreground_lies_less_on_the_border(sign, shift):
    """Whatever sign the component came with; by a threshold in standard deviations."""
    grids, masks = photos_with_an_object(np.random.default_rng(0))
    grids = [sign * grid + shift for grid in grids]
    found = foreground_masks(grids, threshold=0.3)
    for ours, theirs in zip(found, masks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # The other side, and nothing of either where both are cut at the mean.
    flipped = foreground_masks(grids, flip=True)
    for ours, other in zip(foreground_masks(grids), flipped, strict=True):
        np.testing.assert_array_equal(ours, ~other)


def test_the_threshold_counts_standard_deviations():
    # One component: 90 patches at -1, 10 at 9; mean 0, standard deviation 3.
    scores = np.full((10, 10), -1.0)
    scores[4:6, 3:8] = 9
    grid = scores[..., None] * np.array([0.0, 1.0, 0.0])
    for threshold, count in ((-0.34, 100), (-0.33, 10), (2.99, 10)):
        assert foreground_masks([grid], threshold=threshold)[0].sum() == count
    with pytest.raises(ValueError, match=r"threshold=3.01 must be below the highest score, 3.00"):
        foreground_masks([grid], threshold=3.01)


def test_grids_that_are_all_border_have_a_foreground_too():
    grid = np.random.default_rng(0).standard_normal((2, 4, 5))
    assert 0 < foreground_masks([grid])[0].sum() < 8


def test_the_second_pca_is_of_the_foreground_alone():
    features, _ = planted_features()
    rng = np.random.default_rng(1)
    masks = rng.random((3, 4, 4)) < 0.7
    colors = colors_of(features, foreground=masks)
    assert (colors[~masks] == 0).all()
    features[~masks] += 50 * rng.standard_normal((int((~masks).sum()), 7))
    np.testing.assert_array_equal(colors_of(features, foreground=masks), colors)
    assert (colors_of(features)[masks] != colors[masks]).any()


def test_sheet_has_a_photo_and_a_column_for_each_title():
    features, _ = planted_features()
    names = ["short", "a name far too long for two columns of pictures " * 2, "c"]
    photos = [Photo(name, np.full((8, 8, 1), 60 * i, np.uint8)) for i, name in enumerate(names)]
    columns = {"trained": pca_colors(features), "before": pca_colors(features[..., ::-1])}
    sheet = pca_sheet(photos, columns, tile_px=40)
    assert [cell.name for cell in sheet.cells] == names
    drawn = np.asarray(sheet.draw()).astype(int)
    cell = 3 * 40 + 2 * GAP
    assert drawn.shape[1] == 2 * MARGIN + 3 * cell + 2 * MARGIN
    second_photo = drawn[TOP : TOP + 40, MARGIN + cell + MARGIN :][:, :40]
    assert (second_photo == 60).all()  # grey shown as grey
    for column, expected in enumerate(columns.values(), start=1):
        tile = drawn[TOP : TOP + 40, MARGIN + column * (40 + GAP) :][:, :40]
        grid = tile.reshape(4, 10, 4, 10, 3)
        np.testing.assert_array_equal(grid[:, 0, :, 0], expected[0])
        np.testing.assert_array_equal(grid.min(axis=(1, 3)), grid.max(axis=(1, 3)))
    assert "Black is background" in pca_sheet(photos, columns, has_background=False).caption
    assert "Black is background" not in sheet.caption
