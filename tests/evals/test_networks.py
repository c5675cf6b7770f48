"""Baselines take part as if they were models; blocks can be left out."""

import numpy as np
import pytest

from dinov2_jax.evals.baselines import raw_pixels
from dinov2_jax.evals.networks import load_network
from tests.data.conftest import make_image


def images(count=2, side=24):
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, side, side, 3)).astype(np.float32)


def test_pixels_are_pixels():
    model = load_network("pixels:12")
    x = images()
    out = model(x)
    assert out.cls.shape == (2, 32 * 32 * 3) and out.registers.shape[1] == 0
    np.testing.assert_allclose(np.asarray(out.cls).mean(axis=1), 0, atol=1e-6)
    assert out.patches.shape == (2, 4, 12 * 12 * 3)
    # Row by row: the second patch is the right half of the upper row.
    np.testing.assert_array_equal(out.patches[0, 1], x[0, :12, 12:].reshape(-1))
    layers = model.intermediate_layers(x, 1)
    np.testing.assert_array_equal(layers[0].cls, out.cls)


def test_pixels_are_the_baseline_of_in_run_evaluation():
    image = make_image(1, height=64, width=64)
    model = load_network("pixels:8")
    ours = np.asarray(model(image[None].astype(np.float32)).cls)[0].reshape(32, 32, 3)
    theirs = np.moveaxis(raw_pixels(image).reshape(3, 32, 32), 0, -1)
    # The kernels differ, and pixels there are rounded.
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


def test_random_weights_see_the_image_and_depend_on_the_seed(model, model_path):
    x = images(side=12)
    first, other = (load_network(f"random:{model_path}", seed=seed) for seed in (0, 1))
    assert first.spec == model.spec
    out = np.asarray(first(x).cls)
    assert np.abs(out - np.asarray(other(x).cls)).max() > 0.1
    assert np.abs(out[0] - out[1]).max() > 0.01


def test_random_of_a_released_name_needs_no_file():
    model = load_network("random:dinov2_vits14_reg", num_blocks=1)
    assert (model.spec.embed_dim, model.spec.num_register_tokens) == (384, 4)
    assert model.spec.depth == 1 and model.spec.variant != "vit_small"


def test_the_first_blocks_alone(model, model_path):
    cut = load_network(str(model_path), num_blocks=2)
    x = images(side=12)
    expected = model.intermediate_layers(x, [1])[0]  # after the final normalisation
    np.testing.assert_allclose(cut(x).cls, expected.cls, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cut(x).patches, expected.patches, rtol=1e-4, atol=1e-5)


def test_errors(model_path):
    for count in (0, 4):
        with pytest.raises(ValueError, match=rf"num_blocks={count} must be between 1 and .* 3"):
            load_network(str(model_path), num_blocks=count)
    with pytest.raises(ValueError, match="num_blocks=2 must be left out: pixels have no blocks"):
        load_network("pixels", num_blocks=2)
    for name in ("pixels:0", "pixels:x"):
        with pytest.raises(ValueError, match="must be pixels, or pixels:8 for patches of 8 px"):
            load_network(name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_network("random:nowhere")
