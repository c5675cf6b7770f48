"""Targets in blocks are those of `centering`, wherever logits lie and rows are padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses import block_targets, centering, diagnostics
from dinov2_jax.losses.blocks import Layout
from tests.losses.block_cases import (
    TEMP,
    dense_targets,
    draw_prototypes,
    make_prototypes,
    unit_vectors,
)

TOLERANCE = 1e-5  # as in test_centering


@functools.partial(jax.jit, static_argnames=("kind", "num_blocks", "has_kernels"))
def block_probs(
    features, prototypes, center, is_real, temp, *, kind, num_blocks, has_kernels=False
):
    layout = Layout(num_blocks, has_kernels=has_kernels)
    if kind == "softmax_center":
        rows, shared = block_targets.softmax_center(
            features, prototypes, center, temp, layout=layout
        )
    else:
        rows, shared = block_targets.sinkhorn_knopp(
            features, prototypes, temp, is_real=is_real, num_iters=3, layout=layout
        )
    statistics = block_targets.target_statistics(rows, shared, temp, layout=layout)
    return jnp.exp(shared.log_probs(rows, temp)), statistics


@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
@pytest.mark.parametrize("kind", ["sinkhorn_knopp", "softmax_center"])
@pytest.mark.parametrize(
    ("n", "k", "num_blocks", "dtype"),
    [
        (5, 48, 12, jnp.float32),
        (5, 48, 12, jnp.bfloat16),
        (40, 6, 3, jnp.float32),
        (1, 7, 7, jnp.float32),
        (4, 1, 1, jnp.float32),
    ],
)
def test_targets_and_their_statistics(kind, n, k, num_blocks, dtype, has_kernels):
    rng = np.random.default_rng(0)
    features, prototypes = unit_vectors(rng, 2, n, 9), draw_prototypes(rng, k, 9, dtype=dtype)
    center = rng.uniform(-0.3, 0.3, k).astype(np.float32)
    is_real = np.ones((2, n), bool)
    logits = prototypes.logits(features)
    want = dense_targets(kind, logits, center=center, is_real=is_real)
    got, (entropy, best) = block_probs(
        features,
        prototypes,
        center,
        is_real,
        TEMP,
        kind=kind,
        num_blocks=num_blocks,
        has_kernels=has_kernels,
    )
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=1e-12)
    mean = diagnostics.share_of_log_k(entropy.mean(), k)
    flat = want.reshape(-1, k)
    np.testing.assert_allclose(mean, diagnostics.entropy_over_log_k(flat), rtol=1e-5, atol=1e-7)
    of_best = np.take_along_axis(np.asarray(want), np.asarray(best)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(of_best, want.max(axis=-1), rtol=TOLERANCE)
    if not has_kernels:  # whose powers of two break ties of two rows otherwise
        near_best = want >= (1 - TOLERANCE) * want.max(axis=-1, keepdims=True)
        is_clear = near_best.sum(axis=-1) == 1
        # Sinkhorn's two rows have the same share of every prototype that one of them owns.
        assert is_clear.all() == ((kind, n) != ("sinkhorn_knopp", 1))
        np.testing.assert_array_equal(best[is_clear], want.argmax(axis=-1)[is_clear])


@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
def test_padding_rows_change_nothing(has_kernels):
    rng = np.random.default_rng(1)
    prototypes = draw_prototypes(rng, 12, 9)
    features = unit_vectors(rng, 7, 9)
    is_real = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    # Padding repeats a token in a batch; here it lies far beyond the others, to be noticed.
    features[~is_real] *= 30
    args = dict(kind="sinkhorn_knopp", num_blocks=3, has_kernels=has_kernels)
    padded, _ = block_probs(features, prototypes, None, is_real, TEMP, **args)
    alone, _ = block_probs(features[is_real], prototypes, None, np.ones(5, bool), TEMP, **args)
    np.testing.assert_allclose(padded[is_real], alone, rtol=TOLERANCE, atol=1e-12)
    assert np.isfinite(padded).all()
    none, _ = block_probs(features, prototypes, None, np.zeros(7, bool), TEMP, **args)
    assert np.isfinite(none).all()


@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
def test_unused_prototypes_and_any_logits(has_kernels):
    """The identity as prototypes: the rows are their own logits, exactly, in both forms."""
    base = np.random.default_rng(2).uniform(-1, 1, (16, 8)).astype(np.float32)
    unused = np.where(np.arange(8) == 3, -50, base).astype(np.float32)
    apart = base + 100 * np.arange(16, dtype=np.float32)[:, None]  # rows of different height
    identity = make_prototypes(np.eye(8, dtype=np.float32), np.ones((8, 1), np.float32))
    for logits in (base, unused, base * 300, apart):
        got, (entropy, _) = block_probs(
            logits,
            identity,
            None,
            np.ones(16, bool),
            0.04,
            kind="sinkhorn_knopp",
            num_blocks=4,
            has_kernels=has_kernels,
        )
        want = centering.sinkhorn_knopp(logits, 0.04)
        np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=1e-9)
        np.testing.assert_allclose(np.asarray(got).sum(1), 1, rtol=TOLERANCE)
        assert np.isfinite(entropy).all()


def test_rows_of_a_far_center_are_distributions():
    rng = np.random.default_rng(3)
    features, prototypes = unit_vectors(rng, 5, 9), draw_prototypes(rng, 12, 9)
    center = 200 * rng.standard_normal(12).astype(np.float32)
    got, _ = block_probs(
        features, prototypes, center, None, TEMP, kind="softmax_center", num_blocks=4
    )
    want = centering.softmax_center(prototypes.logits(features), center, TEMP)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-12)  # 4000 temperatures in float32


def test_an_iteration_is_needed():
    with pytest.raises(ValueError, match="num_iters=0 must be at least 1"):
        block_targets.sinkhorn_knopp(None, None, TEMP, is_real=None, num_iters=0, layout=Layout(1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_center_moves_as_over_the_logits(dtype):
    rng = np.random.default_rng(4)
    features, prototypes = unit_vectors(rng, 3, 4, 9), draw_prototypes(rng, 12, 9, dtype=dtype)
    center = rng.standard_normal(12).astype(np.float32)
    weights = rng.uniform(0, 1, (3, 4)).astype(np.float32)
    weights[1] = 0
    for row_weights in (weights, 0 * weights):
        got = jax.jit(
            functools.partial(block_targets.update_center, momentum=0.8, layout=Layout(3))
        )(center, features, prototypes, row_weights=row_weights)
        want = centering.update_center(
            center,
            prototypes.logits(features).reshape(12, 12),
            row_weights=row_weights.reshape(-1),
            momentum=0.8,
        )
        np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=1e-7)
