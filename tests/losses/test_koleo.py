"""KoLeo: groups, crops, gradients, and the cases in which the reference is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses import koleo
from tests.parity import require
from tests.reference import golden_values, loops

koleo_loss = jax.jit(koleo.koleo_loss)
value_and_grad = jax.jit(jax.value_and_grad(koleo_loss))


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 1, 6, 4), (2, 3, 5, 8), (1, 4, 9, 2)])
def test_value_is_the_loop(shape):
    features = draw(*shape)
    np.testing.assert_allclose(koleo_loss(features), loops.koleo_loss(features), rtol=1e-5)


def test_neighbors_stay_within_crop_and_group():
    """Twins in another crop or group cost nothing; in the same one they do."""
    apart = draw(2, 2, 4, 8)
    elsewhere = apart.copy()
    elsewhere[0, 1] = elsewhere[1, 0] = elsewhere[1, 1] = elsewhere[0, 0]
    np.testing.assert_allclose(koleo_loss(elsewhere), 2 * koleo_loss(apart[:1, :1]), rtol=1e-5)
    twins = apart.copy()
    twins[0, 0, 0] = twins[0, 0, 1]
    assert koleo_loss(twins) > koleo_loss(apart) + 3


def test_golden_value_and_gradient():
    golden = golden_values.arrays("heads_losses.npz")
    value, grad = value_and_grad(golden["koleo/x"][None, None])
    np.testing.assert_allclose(value, golden["koleo/loss"], rtol=1e-5)
    np.testing.assert_allclose(grad[0, 0], golden["koleo/grad"], rtol=1e-4, atol=1e-8)


@pytest.mark.parity
# The reference's autocast call is deprecated in current PyTorch.
@pytest.mark.filterwarnings("ignore:.*autocast.*:FutureWarning")
def test_reference_value_and_gradient():
    """Sum over crops as in dinov2/train/ssl_meta_arch.py 316-320, mean over groups as its GPUs."""
    torch, losses = require("torch", "dinov2.loss")
    features = draw(2, 3, 7, 16)
    rows = torch.tensor(features, requires_grad=True)
    reference = losses.KoLeoLoss()
    want = sum(reference(rows[c, s]) for c in range(2) for s in range(3)) / 3
    want.backward()
    value, grad = value_and_grad(features)
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    np.testing.assert_allclose(grad, rows.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_image_a_group_is_zero(dtype):
    value, grad = value_and_grad(jnp.asarray(draw(2, 4, 1, 8), dtype))
    assert value == 0 and value.dtype == jnp.float32
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_duplicates_are_finite(group_size):
    features = np.repeat(draw(2, 2, 1, 8), group_size, axis=2)
    value, grad = value_and_grad(features)
    # The reference adds eps to each of the 8 differences, and to the distance.
    np.testing.assert_allclose(value, -2 * np.log(1e-8 * (np.sqrt(8) + 1)), rtol=1e-5)
    assert np.isfinite(grad).all()


def test_zero_features_are_finite():
    features = draw(1, 1, 4, 8)
    features[0, 0, 1] = 0
    value, grad = value_and_grad(features)
    assert np.isfinite(value) and np.isfinite(grad).all()
    value, grad = value_and_grad(np.zeros_like(features))
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_opposite_features_are_neighbors_not_themselves():
    """A group of two is best at opposite points, distance 2: the loss is -ln 2."""
    x = draw(1, 1, 1, 8)
    value, grad = value_and_grad(np.concatenate([x, -x], axis=2))
    np.testing.assert_allclose(value, -np.log(2), rtol=1e-5)
    assert np.abs(grad).max() < 1e-4


def test_bfloat16_features_are_upcast():
    features = jnp.asarray(draw(2, 1, 5, 8), jnp.bfloat16)
    value = koleo_loss(features)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loops.koleo_loss(np.asarray(features, np.float32)), rtol=1e-5)
