"""Diagnostics at the cases whose answer is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses import diagnostics, dino, ibot


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ([[0.25] * 4], 1.0),
        ([[1.0, 0.0, 0.0, 0.0]], 0.0),
        ([[0.5, 0.5, 0.0, 0.0]], math.log(2) / math.log(4)),
        ([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]], 0.5),
        ([[1.0], [1.0]], 0.0),
    ],
)
def test_entropy(probs, expected):
    np.testing.assert_allclose(
        diagnostics.entropy_over_log_k(jnp.array(probs)), expected, atol=1e-6
    )


def test_prototypes_in_use():
    probs = jnp.eye(5)[jnp.array([1, 1, 3, 0])]
    np.testing.assert_allclose(diagnostics.prototypes_in_use(probs), 3 / 5)


@pytest.mark.parametrize("num_local_crops", [0, 3])
@pytest.mark.parametrize("k", [1, 50])
def test_cross_entropy_of_a_uniform_network_is_log_k(num_local_crops, k):
    num_terms = dino.num_loss_terms(num_global_crops=2, num_local_crops=num_local_crops)
    uniform = jnp.full((2, 4, k), 1 / k)
    prototypes = jnp.zeros((k, 1))
    _, parts = dino.dino_loss(
        jnp.zeros((2 + num_local_crops, 4, 1)),
        prototypes,
        uniform,
        num_global_crops=2,
        num_terms=num_terms,
        student_temp=0.1,
    )
    assert parts["student_entropy"] == pytest.approx(1.0 if k > 1 else 0.0)
    got = diagnostics.dino_ce_over_log_k(
        parts["dino_local_loss"],
        parts["dino_global_loss"],
        num_local_crops=num_local_crops,
        num_terms=num_terms,
        num_prototypes=k,
    )
    np.testing.assert_allclose(got, 1.0 if k > 1 else 0.0, rtol=1e-5)

    weights = jnp.array([1 / 3, 1 / 3, 1 / 3, 1.0, 0.0])  # two masked crops of four, one padding
    loss = ibot.ibot_loss(
        jnp.zeros((5, 1)),
        prototypes,
        jnp.full((5, k), 1 / k),
        weights,
        student_temp=0.1,
        num_crops=4,
    )
    got = diagnostics.ibot_ce_over_log_k(loss, weights, num_crops=4, num_prototypes=k)
    np.testing.assert_allclose(got, 1.0 if k > 1 else 0.0, rtol=1e-5)


def test_no_masked_patches_is_zero():
    zero = jnp.zeros(5)
    assert diagnostics.ibot_ce_over_log_k(zero[0], zero, num_crops=4, num_prototypes=9) == 0


def test_feature_std():
    isotropic = jax.random.normal(jax.random.key(0), (4000, 16)) * 7
    np.testing.assert_allclose(diagnostics.feature_std(isotropic), 1.0, atol=0.01)
    same = jnp.broadcast_to(isotropic[0], (8, 16))
    np.testing.assert_allclose(diagnostics.feature_std(same), 0.0, atol=1e-6)
    assert np.isfinite(diagnostics.feature_std(jnp.zeros((8, 16))))


@pytest.mark.parametrize(("n", "d"), [(40, 12), (12, 40)])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_feature_rank_counts_equal_directions(n, d, rank, scale):
    """Covariance with `rank` equal eigenvalues, off the origin."""
    rng = np.random.default_rng(0)
    columns = np.linalg.qr(np.c_[np.ones(n), rng.standard_normal((n, rank))])[0][:, 1:]
    directions = np.linalg.qr(rng.standard_normal((d, rank)))[0]
    features = scale * (columns @ directions.T + 0.5)
    got = diagnostics.feature_rank(jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(got, rank, rtol=1e-4)


def test_feature_rank_is_the_participation_ratio():
    features = np.random.default_rng(0).standard_normal((20, 6)) * np.arange(1, 7)
    eigenvalues = np.linalg.eigvalsh(np.cov(features.T))
    want = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    got = diagnostics.feature_rank(jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert diagnostics.feature_rank(jnp.ones((20, 6))) == 0


def test_feature_metrics_are_of_all_rows():
    cls = jax.random.normal(jax.random.key(0), (2, 2, 3, 5))
    got = jax.jit(diagnostics.feature_metrics)(cls)
    assert set(got) == {"feature_std", "feature_rank"}
    np.testing.assert_allclose(
        got["feature_rank"], diagnostics.feature_rank(cls.reshape(12, 5)), rtol=1e-5
    )
