"""Attention maps are the model's probabilities at their places, and tiles show them."""

import numpy as np
import pytest

from dinov2_jax.model import Model
from dinov2_jax.visualize.attention import attention_maps, attention_sheet, heat_tile
from dinov2_jax.visualize.patches import normalized
from dinov2_jax.visualize.photos import Photo
from tests.convert.models import make_params, make_spec


@pytest.fixture(scope="module")
def model() -> Model:
    spec = make_spec("registers")
    return Model(spec, make_params(spec))


def photo() -> Photo:
    return Photo("p.jpg", np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))


@pytest.mark.parametrize("block", [None, 0])
def test_maps_are_of_the_patches_alone(model, block):
    (heads,) = attention_maps(model, [photo()], block=block)
    assert heads.shape == (2, 2, 3)
    probs = np.asarray(model.cls_attention(normalized(model, photo()), block))[0]
    assert probs.shape == (2, 1 + 4 + 6)
    np.testing.assert_allclose(heads[:, 1, 2], probs[:, 10], atol=1e-6)
    np.testing.assert_allclose(heads[:, 0, 0], probs[:, 5], atol=1e-6)
    np.testing.assert_allclose(heads.sum(axis=(1, 2)), 1 - probs[:, :5].sum(axis=1), atol=1e-6)


def test_attention_that_is_not_finite_is_an_error(model):
    params = make_params(model.spec)
    params["blocks"]["attn"]["qkv"]["bias"][:] = np.nan
    with pytest.raises(ValueError, match=r"attention must be finite, that of p\.jpg is not"):
        attention_maps(Model(model.spec, params), [photo()])


def test_tiles_are_brightest_where_attention_is_largest():
    heat = np.zeros((4, 6), np.float32)
    heat[1, 4] = 0.3
    tile = np.asarray(heat_tile(np.zeros((8, 12, 3), np.uint8), heat, 120)).astype(int)
    assert tile.shape == (80, 120, 3)
    light = tile.sum(axis=-1)
    y, x = np.unravel_index(light.argmax(), light.shape)
    # Patches of 20 px: the centre of row 1, column 4 is at (90, 30).
    assert abs(x - 90) <= 10 and abs(y - 30) <= 10
    assert light[70, 10] < 20  # black photo, no attention
    between = light[30, 65:90]
    assert (np.diff(between) >= 0).all() and len(set(between.tolist())) > 5  # interpolated
    white = np.asarray(heat_tile(np.full((8, 12, 3), 255, np.uint8), heat, 120))
    assert white[70, 10].min() > 70  # the photo shines through
    assert np.isfinite(heat_tile(photo().pixels, 0 * heat, 120)).all()


def test_sheet_has_photo_mean_and_heads():
    heads = np.full((9, 2, 3), 0.1, np.float32)
    sheet = attention_sheet([photo()], [heads], block=3, tile_px=30)
    assert sheet.title == "Attention of CLS in block 3"
    (cell,) = sheet.cells
    # 11 tiles, 8 a row.
    assert cell.image.size[0] == 8 * 30 + 7 * 4 and cell.image.size[1] > 2 * 20
