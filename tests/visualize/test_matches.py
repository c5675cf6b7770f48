"""Matches of photos whose correspondence is known."""

import numpy as np
import pytest

from dinov2_jax.model import Model
from dinov2_jax.visualize import sheets
from dinov2_jax.visualize.matches import Matches, distinct_color, matches_sheet, mutual_matches
from dinov2_jax.visualize.patches import patch_grids
from dinov2_jax.visualize.photos import Photo
from tests.convert.models import make_params, make_spec


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_photo_matches_itself_patch_by_patch():
    grid = noise(5, 6, 8)
    found = mutual_matches(grid, 3 * grid)
    assert len(found.similarity) == 30
    np.testing.assert_array_equal(found.first, found.second)
    assert {tuple(place) for place in found.first} == {(r, c) for r in range(5) for c in range(6)}
    np.testing.assert_allclose(found.similarity, 1, atol=1e-6)


def test_matches_are_mutual_nearest_neighbours_by_loops():
    a, b = noise(3, 4, 8), noise(5, 3, 8, seed=1)
    flat_a, flat_b = a.reshape(12, 8), b.reshape(15, 8)
    cosine = [
        [x @ y / np.sqrt((x @ x) * (y @ y)) for y in flat_b.astype(np.float64)]
        for x in flat_a.astype(np.float64)
    ]
    pairs = [
        (cosine[i][j], divmod(i, 4), divmod(j, 3))
        for i in range(12)
        for j in range(15)
        if cosine[i][j] == max(cosine[i]) == max(row[j] for row in cosine)
    ]
    pairs.sort(reverse=True)
    found = mutual_matches(a, b)
    assert 2 < len(pairs) < 12
    assert found.first.tolist() == [list(x) for _, x, _ in pairs]
    assert found.second.tolist() == [list(x) for _, _, x in pairs]
    np.testing.assert_allclose(found.similarity, [x for x, _, _ in pairs], atol=1e-6)
    fewer = mutual_matches(a, b, num_matches=2)
    assert fewer.first.tolist() == found.first[:2].tolist()


def test_a_shifted_copy_matches_by_the_shift():
    """Through a network of which nothing depends on the place: no positions, silent blocks."""
    spec = make_spec("mlp", depth=1)
    params = make_params(spec)
    params["pos_embed"][:] = 0
    for branch in ("ls1", "ls2"):
        params["blocks"][branch]["gamma"][:] = 0
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    rows, cols = 2, 3
    shifted = image[rows * 4 :, cols * 4 :]
    grids = patch_grids(Model(spec, params), [Photo("a", image), Photo("b", shifted)])
    assert [grid.shape[:2] for grid in grids] == [(8, 10), (6, 7)]
    found = mutual_matches(*grids)
    assert len(found.similarity) == 6 * 7
    np.testing.assert_array_equal(found.first - found.second, [[rows, cols]] * 42)


def test_only_the_foreground_takes_part():
    grid = noise(5, 6, 8)
    masks = [np.zeros((5, 6), bool), np.zeros((5, 6), bool)]
    masks[0][1:4, 2:5] = masks[1][2:5, 2:4] = True
    found = mutual_matches(grid, grid, foreground=masks)
    common = {tuple(place) for place in np.argwhere(masks[0] & masks[1])}
    sure = found.similarity > 1 - 1e-6
    assert {tuple(place) for place in found.first[sure]} == common
    np.testing.assert_array_equal(found.first[sure], found.second[sure])
    assert all(masks[0][tuple(x)] and masks[1][tuple(y)] for x, y in zip(*found[:2], strict=True))
    masks[1][:] = False
    with pytest.raises(ValueError, match="both photos must have foreground patches"):
        mutual_matches(grid, grid, foreground=masks)


def test_lines_end_on_their_patches_in_distinct_colors():
    colors = [distinct_color(i) for i in range(60)]
    apart = np.abs(np.array(colors)[:, None] - np.array(colors)[None]).max(axis=-1)
    assert apart[~np.eye(60, dtype=bool)].min() >= 8
    photos = (
        Photo("a", np.zeros((40, 80, 3), np.uint8)),
        Photo("b", np.zeros((80, 40, 3), np.uint8)),
    )
    # Patches of 10 px: centres (35, 15) of 80 x 40 and (5, 75) of 40 x 80.
    found = Matches(np.array([[1, 3]]), np.array([[7, 0]]), np.array([0.5], np.float32))
    sheet = matches_sheet(photos, found, patch_size=10, tile_px=160)
    (cell,) = sheet.cells
    assert cell.name == "a and b" and "similar: 1," in sheet.caption and "0.500" in sheet.caption
    drawn = np.asarray(cell.image).astype(int)
    assert drawn.shape == (320, 160 + sheets.MARGIN_PX + 160, 3)
    for x, y in ((70, 30), (160 + sheets.MARGIN_PX + 20, 300)):
        assert np.abs(drawn[y, x] - distinct_color(0)).max() < 8, (x, y)
    touched = np.argwhere(drawn[:78, :158].max(axis=-1) > 0)  # black but for the line
    assert touched[:, 1].min() > 60 and touched[:, 0].min() > 20
