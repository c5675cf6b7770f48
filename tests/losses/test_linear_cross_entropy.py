"""Cross-entropy of products against the plain formula: value, both gradients, what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses.linear_cross_entropy import linear_cross_entropy
from dinov2_jax.sharding import make_mesh
from tests.losses.block_cases import cross_entropy, unit_vectors
from tests.reference import loops

TEMP = 0.1


def draw(seed=0, *, row_shape=(2, 3, 5), k=24, width=8, scale=1.0):
    """Features, prototypes, targets whose rows do not sum to 1, and weights, some of them 0."""
    rng = np.random.default_rng(seed)
    weight = unit_vectors(rng, k, width) * rng.uniform(0.5, 1.5, (k, 1)).astype(np.float32) * scale
    targets = rng.uniform(0, 2, (*row_shape, k)).astype(np.float32) ** 4
    row_weights = rng.uniform(0, 1, row_shape) * (rng.random(row_shape) < 0.7)
    return unit_vectors(rng, *row_shape, width), weight, targets, row_weights.astype(np.float32)


def plain(features, weight, targets, row_weights, temp=TEMP):
    logits = jnp.einsum("...d,kd->...k", features, weight, precision="highest")
    return (row_weights * cross_entropy(logits, targets, temp)).sum()


def fused(features, weight, targets, row_weights, temp=TEMP):
    return linear_cross_entropy(features, weight, targets, row_weights, temp)[0]


def value_and_grads(function, case, cotangent=1.0):
    run = jax.value_and_grad(lambda *args: cotangent * function(*args), argnums=(0, 1))
    return jax.jit(run)(*case)


def assert_same(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    for left, right in zip(got[1], want[1], strict=True):
        scale = np.abs(right).max()
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("row_shape", [(4,), (2, 5), (3, 4, 2)])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_value_and_gradients_are_those_of_the_plain_form(row_shape, scale):
    case = draw(row_shape=row_shape, scale=scale)
    got = value_and_grads(fused, case, cotangent=-3.0)
    assert_same(got, value_and_grads(plain, case, cotangent=-3.0))
    np.testing.assert_allclose(-3.0 * jax.jit(fused)(*case), got[0], rtol=1e-6)  # without gradient


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (5, 0), (40, 0), (1, 300)])
def test_many_prototypes_and_large_logits_keep_their_digits(scale, offset):
    """Against float64 on the same logits: 16,384 of them, sharp, or far from 0 together."""
    rng = np.random.default_rng(0)
    features, weight = rng.normal(size=(1, 9, 16)), rng.normal(size=(16_384, 16))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    weight *= scale / np.linalg.norm(weight, axis=-1, keepdims=True)
    # A feature of 1 for the offset, which is exact.
    features = np.float32(np.concatenate([features, np.ones((1, 9, 1))], axis=-1))
    weight = np.float32(np.concatenate([weight, np.full((16_384, 1), offset)], axis=-1))
    product = jax.jit(lambda z, w: jnp.einsum("nd,kd->nk", z, w))
    logits = np.float64(product(features[0], weight))
    targets = jax.nn.softmax(np.float32(logits - logits.max(axis=-1, keepdims=True)) / 0.4)
    z = logits / TEMP
    log_probs = z - z.max(axis=-1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(axis=-1, keepdims=True))
    row_weights = np.ones((1, 9), np.float32)
    _, (rows, entropy) = jax.jit(linear_cross_entropy)(
        features, weight, targets[None], row_weights, TEMP
    )
    np.testing.assert_allclose(rows[0], -(np.float64(targets) * log_probs).sum(-1), rtol=1e-5)
    want = -(np.exp(log_probs) * log_probs).sum(axis=-1)
    np.testing.assert_allclose(entropy[0], want, rtol=1e-5, atol=1e-6)


def test_a_wrong_target_weight_or_temperature_is_seen():
    """What the comparison above can tell apart: each mistake is at least 100 tolerances."""
    features, weight, targets, row_weights = case = draw()
    want = value_and_grads(plain, case)
    mistakes = {
        "mass 1": (features, weight, targets / targets.sum(-1, keepdims=True), row_weights),
        "another row's target": (features, weight, np.roll(targets, 1, axis=-2), row_weights),
        "another group's target": (features, weight, np.roll(targets, 1, axis=0), row_weights),
        "padding counts": (features, weight, targets, np.maximum(row_weights, 0.01)),
        "temperature": (features, weight * 1.01, targets, row_weights),
    }
    for name, mistaken in mistakes.items():
        with pytest.raises(AssertionError):
            assert_same(value_and_grads(fused, mistaken), want, tolerance=1e-3)
            pytest.fail(name)


def test_rows_are_the_loop_and_the_entropy_of_the_softmax():
    features, weight, targets, _ = case = draw(row_shape=(5,))
    _, (rows, entropy) = jax.jit(linear_cross_entropy)(*case, TEMP)
    logits = features @ weight.T
    want = [loops.cross_entropy(t, x, TEMP) for t, x in zip(targets, logits, strict=True)]
    np.testing.assert_allclose(rows, want, rtol=1e-5)
    log_probs = jax.nn.log_softmax(logits / TEMP)
    np.testing.assert_allclose(entropy, -(jnp.exp(log_probs) * log_probs).sum(-1), rtol=1e-5)


def test_padding_rows_have_no_gradient():
    case = draw()
    _, (to_features, _) = value_and_grads(fused, case)
    np.testing.assert_array_equal(np.abs(to_features).max(axis=-1) == 0, case[-1] == 0)


def test_all_else_is_constant():
    features, weight, *constants = draw()
    grads = jax.grad(fused, argnums=(2, 3, 4))(features, weight, *constants, TEMP)
    assert not any(np.any(leaf) for leaf in grads)
    books = jax.grad(lambda x: linear_cross_entropy(x, weight, *constants, TEMP)[1][0].sum())
    assert not np.any(books(features))


def test_bfloat16_products_are_summed_in_float32():
    features, weight, *constants = draw()
    weight = jnp.asarray(weight, jnp.bfloat16)
    rounded = [jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in (features, weight)]
    value, grads = value_and_grads(fused, (features, weight, *constants))
    want = value_and_grads(plain, (*rounded, *constants))
    assert [x.dtype for x in (value, *grads)] == [jnp.float32, jnp.float32, jnp.bfloat16]
    assert_same((value, grads[:1]), (want[0], want[1][:1]))
    assert_same((value, [np.asarray(grads[1], np.float32)]), (want[0], want[1][1:]), 2**-8)


def test_one_prototype_costs_nothing():
    features, weight, targets, row_weights = draw(k=1, scale=20.0)
    value, grads = value_and_grads(fused, (features, weight, targets, row_weights))
    np.testing.assert_allclose(value, 0, atol=1e-4)
    assert max(np.abs(x).max() for x in grads) < 1e-4


def test_the_backward_pass_keeps_two_gradients_alone():
    features, weight, *constants = draw(row_shape=(64,), k=512)
    _, pullback = jax.vjp(lambda x, w: fused(x, w, *constants), features, weight)
    assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) == features.size + weight.size


@pytest.mark.parametrize(
    "axes",
    [dict(data=8), dict(data=2, fsdp=2, model=2), dict(data=1, fsdp=1, model=8)],
    ids=str,
)
def test_eight_devices_are_one(axes):
    case = draw(row_shape=(8, 3, 2), k=32)
    want = value_and_grads(plain, case)
    mesh = make_mesh(**axes)
    rows, prototypes = jax.P(("data", "fsdp")), jax.P(("model", "fsdp"))
    specs = rows, prototypes, rows, rows
    case = [
        jax.device_put(x, jax.NamedSharding(mesh, spec))
        for x, spec in zip(case, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        assert_same(value_and_grads(fused, case), want)
