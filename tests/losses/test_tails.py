"""Sinkhorn-Knopp's targets where float32's powers end, 87 temperatures below a row's best logit.

Every form has to leave out the same entries, in sums and in targets: a prototype that few rows can
use has a factor u of up to e^86, which makes weight of what another form has as 0.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses import block_targets, centering
from dinov2_jax.losses.blocks import Layout
from tests.losses.block_cases import (
    TEMP,
    assert_same,
    block_loss,
    dense_loss,
    draw,
    make_prototypes,
    same,
    value_and_grads,
)

TOLERANCE = 1e-5  # of a target: logarithms of e^86 are added, to 1e-5 in float32

tails = pytest.mark.parametrize("tail", [86, 88, 90, 96])
spreads = pytest.mark.parametrize("spread", [0, 0.5, 3])


def draw_logits(tail: float, spread: float, *, rows: int = 600) -> np.ndarray:
    """`[rows, 8]`: four prototypes near the row's best, four `tail` +- `spread` temperatures below.

    Rows lie within 20 temperatures of each other: their first v is between e^-20 and 1.
    """
    rng = np.random.default_rng(0)
    logits = np.zeros((rows, 8))
    logits[:, :4] = rng.uniform(-0.2, 0, (rows, 4))
    logits[:, 4:] = -tail + rng.uniform(-spread, spread, (rows, 4))
    return np.float32((logits + rng.uniform(0, 20, (rows, 1))) * TEMP)


@functools.partial(jax.jit, static_argnames="form")
def targets(logits, *, form: str):
    """`[rows, 8]`. The identity as prototypes: rows are their own logits, exactly, in all forms."""
    if form == "dense":
        return centering.sinkhorn_knopp(logits, TEMP)
    identity = make_prototypes(np.eye(8, dtype=np.float32), np.ones((8, 1), np.float32))
    layout = Layout(4, has_kernels=form == "kernels")
    is_real = jnp.ones(len(logits), bool)
    rows, shared = block_targets.sinkhorn_knopp(
        logits, identity, TEMP, is_real=is_real, num_iters=3, layout=layout
    )
    return jnp.exp(shared.log_probs(rows, TEMP))


def exact_targets(logits):
    """In float64, of the entries that count and the smallest sum that is divided by."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    matrix = np.exp(np.float64(shifted) / TEMP) * (shifted >= np.float32(-87 * TEMP))
    v = np.exp(np.float64(logits.max(axis=1) - logits.max()) / TEMP)
    share = len(logits) / logits.shape[1]
    for _ in range(3):
        u = share / np.maximum(v @ matrix, 4 * share * np.finfo(np.float32).tiny)
        v = 1 / (matrix @ u)
    return matrix * u * v[:, None]


@pytest.mark.parametrize("form", ["dense", "blocks", "kernels"])
@spreads
@tails
def test_targets_are_the_exact_ones(tail, spread, form):
    logits = draw_logits(tail, spread)
    got = targets(logits, form=form)
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=TOLERANCE)
    np.testing.assert_allclose(got, exact_targets(logits), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
@spreads
@tails
def test_losses_and_gradients_are_the_dense_ones(tail, spread, has_kernels):
    case = draw(row_shape=(2, 20), k=8)
    case["teacher"] = draw_logits(tail, spread, rows=40).reshape(2, 20, 8)
    ones = np.ones((8, 1), np.float32)
    case["teacher_prototypes"] = make_prototypes(np.eye(8, dtype=np.float32), ones)
    settings = dict(kind="sinkhorn_knopp", assign=same)
    got = value_and_grads(block_loss, case, has_kernels=has_kernels, **settings)
    assert_same(got, value_and_grads(dense_loss, case, **settings))


@pytest.mark.parametrize("form", ["blocks", "kernels"])
def test_entropies_of_entries_that_do_not_count_are_finite(form):
    logits = draw_logits(96, 3)
    identity = make_prototypes(np.eye(8, dtype=np.float32), np.ones((8, 1), np.float32))
    layout = Layout(4, has_kernels=form == "kernels")
    target = block_targets.sinkhorn_knopp(
        logits, identity, TEMP, is_real=jnp.ones(600, bool), num_iters=3, layout=layout
    )
    entropy, _ = block_targets.target_statistics(*target, TEMP, layout=layout)
    probs = exact_targets(logits)
    want = -np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-300)), 0).sum(axis=1)
    np.testing.assert_allclose(entropy, want, rtol=0, atol=TOLERANCE)
