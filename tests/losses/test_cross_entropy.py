"""Cross-entropy and its hand-written backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses.cross_entropy import cross_entropy
from tests.reference import loops


def plain(logits, targets, temp):
    return -(targets * jax.nn.log_softmax(logits / temp, axis=-1)).sum(axis=-1)


def draw(seed, *, target_shape=(3, 4, 7), logit_shape=(3, 4, 7), scale=1.0):
    keys = jax.random.split(jax.random.key(seed))
    targets = jax.random.uniform(keys[0], target_shape)  # rows do not sum to 1
    return jax.random.normal(keys[1], logit_shape) * scale, targets


def test_value_is_the_loop():
    logits, targets = draw(0, target_shape=(5, 7), logit_shape=(5, 7))
    got = jax.jit(cross_entropy)(logits, targets, 0.1)
    rows = zip(np.asarray(targets), np.asarray(logits), strict=True)
    want = [loops.cross_entropy(target, row, 0.1) for target, row in rows]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("target_shape", [(3, 4, 7), (1, 4, 7), (4, 7)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_value_and_gradient_are_those_of_the_plain_form(target_shape, scale):
    logits, targets = draw(1, target_shape=target_shape, scale=scale)
    weights = jnp.arange(12.0).reshape(3, 4)  # an uneven cotangent, one of them 0

    def total(function):
        return jax.jit(jax.value_and_grad(lambda x: (weights * function(x, targets, 0.1)).sum()))

    got, got_grad = total(cross_entropy)(logits)
    want, want_grad = total(plain)(logits)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(got_grad, want_grad, rtol=1e-5, atol=1e-5 * np.abs(want_grad).max())


def test_targets_and_temperature_are_constants():
    logits, targets = draw(2)
    grads = jax.grad(lambda *args: cross_entropy(*args).sum(), argnums=(1, 2))(logits, targets, 0.1)
    np.testing.assert_array_equal(grads[0], 0)
    np.testing.assert_array_equal(grads[1], 0)


def test_bfloat16_logits_are_upcast():
    logits, targets = draw(3)
    logits = logits.astype(jnp.bfloat16)
    got, grad = jax.value_and_grad(lambda x: cross_entropy(x, targets, 0.1).sum())(logits)
    want = plain(logits.astype(jnp.float32), targets, 0.1).sum()
    assert got.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_one_prototype_costs_nothing():
    got, grad = jax.value_and_grad(lambda x: cross_entropy(x, jnp.ones((3, 1)), 0.1).sum())(
        jnp.array([[0.3], [-20.0], [5.0]])
    )
    np.testing.assert_allclose(got, 0, atol=1e-5)
    np.testing.assert_allclose(grad, 0, atol=1e-5)


def test_gradient_passes_through_no_stored_copy():
    """What the backward pass keeps is the inputs and two numbers a row: no second [n, k]."""
    logits, targets = draw(4, target_shape=(64, 512), logit_shape=(64, 512))
    _, pullback = jax.vjp(lambda x: cross_entropy(x, targets, 0.1), logits)
    large = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= logits.size]
    assert len(large) <= 2
