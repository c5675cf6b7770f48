"""Patch grids are the model's, and features that nothing can be drawn from are errors."""

import numpy as np
import pytest

from dinov2_jax.model import Model
from dinov2_jax.visualize import patches
from dinov2_jax.visualize.patches import check_features, patch_grids
from dinov2_jax.visualize.photos import Photo
from tests.convert.models import make_params, make_spec


@pytest.fixture(scope="module")
def model() -> Model:
    spec = make_spec("registers")
    return Model(spec, make_params(spec))


def photo(height: int, width: int) -> Photo:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Photo("photo.jpg", pixels)


def test_grids_are_the_models_patches(model):
    photos = [photo(8, 12), photo(12, 8)]
    grids = patch_grids(model, photos)
    assert [grid.shape for grid in grids] == [(2, 3, 16), (3, 2, 16)]
    for grid, x in zip(grids, photos, strict=True):
        whole = model.preprocess(x.pixels, resize_size_px=8, crop=False)
        np.testing.assert_allclose(grid.reshape(6, 16), model(whole).patches[0], atol=1e-5)
    (first,) = patch_grids(model, photos[:1], block=0)
    (expected,) = model.intermediate_layers(
        model.preprocess(photos[0].pixels, resize_size_px=8, crop=False), [0], reshape=True
    )
    np.testing.assert_allclose(first, expected.patches[0], atol=1e-5)
    assert not np.allclose(first, grids[0], atol=0.1)


def test_what_cannot_be_drawn_is_an_error(model, monkeypatch):
    with pytest.raises(ValueError, match=r"must be different blocks of 0\.\.1"):
        patch_grids(model, [photo(8, 12)], block=2)
    features = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    check_features(features, "x")
    check_features(1 + 1e-4 * features, "x")
    for equal in (np.full((10, 4), 2, np.float32), np.zeros((10, 4)), 1 + 1e-6 * features):
        with pytest.raises(ValueError, match="x must differ, these 10 are equal"):
            check_features(equal, "x")
    features[3, 1], features[5, 2] = np.nan, np.inf
    with pytest.raises(ValueError, match="x must be finite, 2 of 10 are not"):
        check_features(features, "x")
    monkeypatch.setattr(patches, "MAX_PATCHES", 5)
    with pytest.raises(ValueError, match=r"photo\.jpg has 6 patches at 12 x 8 px, more than 5"):
        patch_grids(model, [photo(8, 12)])
