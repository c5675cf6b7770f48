"""Sinkhorn-Knopp and softmax centering against loops, golden values and the live reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_jax.losses import centering
from tests.parity import require
from tests.reference import golden_values, loops
from tests.reference.process_group import one_process_group

# Float32 sums of some hundred terms; exp amplifies a logit's last bit by |logit| / temp, some 25.
TOLERANCE = 1e-5

# Compiled as one program: faster here than operation by operation.
sinkhorn_knopp = jax.jit(centering.sinkhorn_knopp, static_argnames="num_iters")
softmax_center = jax.jit(centering.softmax_center)
update_center = jax.jit(centering.update_center)


@pytest.fixture(scope="module")
def golden():
    return golden_values.arrays("heads_losses.npz")


def cosine_logits(seed: int, n: int, k: int) -> np.ndarray:
    """Logits in [-1, 1] as a head makes them."""
    return np.random.default_rng(seed).uniform(-1, 1, (n, k)).astype(np.float32)


@pytest.mark.parametrize("num_iters", [1, 2, 3, 10])
@pytest.mark.parametrize("temp", [0.04, 0.07])
@pytest.mark.parametrize("shape", [(12, 20), (1, 7), (30, 5), (4, 1)])
def test_sinkhorn_is_the_loop(shape, temp, num_iters):
    logits = cosine_logits(0, *shape)
    got = sinkhorn_knopp(logits, temp, num_iters=num_iters)
    want = loops.sinkhorn_knopp(logits, temp, num_iters)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=1e-12)


def test_sinkhorn_is_not_a_per_row_softmax_shift():
    """Rows of different height must pull the first prototype sums differently."""
    logits = cosine_logits(1, 6, 10)
    lifted = logits + np.linspace(-0.1, 0.1, 6, dtype=np.float32)[:, None]
    got = sinkhorn_knopp(lifted, 0.05)
    np.testing.assert_allclose(got, loops.sinkhorn_knopp(lifted, 0.05), rtol=TOLERANCE, atol=1e-12)
    assert np.abs(got - loops.sinkhorn_knopp(logits, 0.05)).max() > 1e-3


def test_sinkhorn_golden(golden):
    dino = sinkhorn_knopp(golden["sk/logits"], golden["sk/temp"])
    ibot = sinkhorn_knopp(golden["sk/ibot_logits"], golden["sk/ibot_temp"])
    np.testing.assert_allclose(dino, golden["sk/dino_targets"], rtol=TOLERANCE, atol=1e-12)
    np.testing.assert_allclose(ibot, golden["sk/ibot_targets"], rtol=TOLERANCE, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("num_padding", [0, 3])
def test_sinkhorn_is_the_reference(num_padding):
    torch, losses = require("torch", "dinov2.loss")
    logits = cosine_logits(2, 9, 40)
    dino = losses.DINOLoss(40).sinkhorn_knopp_teacher(torch.tensor(logits), 0.05)
    with one_process_group():
        ibot = losses.iBOTPatchLoss(40).sinkhorn_knopp_teacher(
            torch.tensor(logits), 0.05, n_masked_patches_tensor=torch.tensor([9])
        )
    padded = np.concatenate([logits, cosine_logits(3, num_padding, 40)])
    row_weights = np.r_[np.ones(9, np.float32), np.zeros(num_padding, np.float32)]
    got = sinkhorn_knopp(padded, 0.05, row_weights=row_weights)
    np.testing.assert_allclose(got[:9], dino, rtol=TOLERANCE, atol=1e-12)
    np.testing.assert_allclose(got[:9], ibot, rtol=TOLERANCE, atol=1e-12)


# A few shapes only: each costs a compilation.
sizes = st.sampled_from([(1, 5, 2), (6, 9, 3), (8, 1, 1), (7, 4, 0)])
property_test = settings(max_examples=40, deadline=None)


@property_test
@given(size=sizes, seed=st.integers(0, 2**20), temp=st.sampled_from([0.04, 0.1, 1.0]))
def test_sinkhorn_properties(size, seed, temp):
    n, k, num_padding = size
    rng = np.random.default_rng(seed)
    logits = rng.uniform(-1, 1, (n, k)).astype(np.float32)
    probs = np.asarray(sinkhorn_knopp(logits, temp))

    # Rows are distributions.
    assert (probs >= 0).all()
    np.testing.assert_allclose(probs.sum(1), 1, rtol=TOLERANCE)

    # Padding, wherever it stands and whatever it holds, is 0 and changes nothing.
    order = rng.permutation(n + num_padding)
    padding = rng.uniform(-50, 50, (num_padding, k)).astype(np.float32)
    padded = np.concatenate([logits, padding])[order]
    row_weights = (order < n).astype(np.float32)
    got = np.asarray(sinkhorn_knopp(padded, temp, row_weights=row_weights))
    assert (got[order >= n] == 0).all()
    back = np.empty((n, k))
    back[order[order < n]] = got[order < n]
    np.testing.assert_allclose(back, probs, rtol=TOLERANCE, atol=1e-12)

    # Neither prototypes nor rows carry an order (rows: the permutation above).
    columns = rng.permutation(k)
    permuted = sinkhorn_knopp(logits[:, columns], temp)
    np.testing.assert_allclose(permuted, probs[:, columns], rtol=TOLERANCE, atol=1e-12)

    # One shift for all logits cancels, however large: exact in float32 on a grid of 1 / 1024.
    grid = np.round(logits * 1024).astype(np.float32) / 1024
    shifted = sinkhorn_knopp(grid + np.float32(1000), temp)
    np.testing.assert_allclose(shifted, sinkhorn_knopp(grid, temp), rtol=TOLERANCE, atol=1e-12)


@property_test
@given(seed=st.integers(0, 2**20))
def test_sinkhorn_balances_the_columns(seed):
    logits = np.random.default_rng(seed).uniform(-1, 1, (64, 4)).astype(np.float32)
    many = np.asarray(sinkhorn_knopp(logits, 1.0, num_iters=30))  # 64 ** 30: nothing may grow
    np.testing.assert_allclose(many.sum(0), 64 / 4, rtol=1e-4)
    # Iterations bring them closer.
    gap = [np.ptp(np.asarray(sinkhorn_knopp(logits, 1.0, num_iters=i)).sum(0)) for i in (1, 2, 3)]
    assert gap[0] > gap[1] > gap[2]


def test_sinkhorn_survives_any_logits():
    """The reference's exp overflows or leaves empty rows here; scaled vectors do not."""
    logits = cosine_logits(4, 6, 8)
    many_rows = cosine_logits(4, 64, 8)
    many_rows[:, 3] = -50  # a prototype that no row can use, and more rows than prototypes
    apart = logits + np.arange(6, dtype=np.float32)[:, None] * 100
    for extreme in (logits * 300, apart, many_rows):
        probs = np.asarray(sinkhorn_knopp(extreme, 0.04))
        assert np.isfinite(probs).all()
        np.testing.assert_allclose(probs.sum(1), 1, rtol=TOLERANCE)


def test_sinkhorn_without_real_rows_is_zero():
    probs = sinkhorn_knopp(cosine_logits(0, 4, 8), 0.04, row_weights=np.zeros(4, np.float32))
    np.testing.assert_array_equal(probs, 0)


def test_sinkhorn_needs_an_iteration():
    with pytest.raises(ValueError, match="num_iters=0 must be at least 1"):
        sinkhorn_knopp(cosine_logits(0, 4, 8), 0.04, num_iters=0)


def test_bfloat16_logits_are_upcast():
    logits = jnp.asarray(cosine_logits(0, 4, 8), jnp.bfloat16)
    center = jnp.zeros(8)
    for probs, same in (
        (sinkhorn_knopp(logits, 0.04), sinkhorn_knopp(logits.astype(jnp.float32), 0.04)),
        (softmax_center(logits, center, 0.04), jax.nn.softmax(logits.astype(jnp.float32) / 0.04)),
    ):
        assert probs.dtype == jnp.float32
        np.testing.assert_allclose(probs, same, rtol=1e-6)
    assert update_center(center, logits, momentum=0.9).dtype == jnp.float32


@pytest.mark.parametrize("loss", ["dino", "ibot"])
def test_centering_golden(golden, loss):
    """Three rounds at temperature 0.05: the targets use the center of the rounds before."""
    center = jnp.zeros(512)
    for i in range(3):
        logits = golden[f"center/logits{i}" if loss == "dino" else f"center/ibot_logits{i}"]
        logits = logits.reshape(-1, 512)
        probs = softmax_center(logits, center, 0.05)
        want = golden[f"center/{loss}_probs{i}"].reshape(-1, 512)
        np.testing.assert_allclose(probs, want, rtol=TOLERANCE, atol=1e-12)
        center = update_center(center, logits, momentum=0.9)
        want = golden[f"center/{loss}_center{i}"].reshape(-1)
        np.testing.assert_allclose(center, want, rtol=TOLERANCE, atol=1e-8)


@pytest.mark.parity
def test_centering_is_the_reference():
    torch, losses = require("torch", "dinov2.loss")
    dino, ibot = losses.DINOLoss(20, center_momentum=0.8), losses.iBOTPatchLoss(20)
    dino_center = ibot_center = jnp.zeros(20)
    for i in range(4):
        logits = cosine_logits(i, 6, 20)
        rows = torch.tensor(logits)
        temp = 0.04 + 0.01 * i
        want_dino = dino.softmax_center_teacher(rows, temp)
        want_ibot = ibot.softmax_center_teacher(rows[None], temp)[0]
        dino.update_center(rows)
        ibot.update_center(rows[None])
        got = softmax_center(logits, dino_center, temp)
        np.testing.assert_allclose(got, want_dino, rtol=TOLERANCE, atol=1e-12)
        got = softmax_center(logits, ibot_center, temp)
        np.testing.assert_allclose(got, want_ibot, rtol=TOLERANCE, atol=1e-12)
        dino_center = update_center(dino_center, logits, momentum=0.8)
        ibot_center = update_center(ibot_center, logits, momentum=0.9)


def test_center_ignores_padding_and_weighs_rows():
    logits = cosine_logits(0, 5, 3)
    center = jnp.array([0.5, -0.5, 0.0])
    got = update_center(
        center, logits, momentum=0.9, row_weights=np.array([1, 0, 1, 1, 0], np.float32)
    )
    want = 0.9 * center + 0.1 * logits[[0, 2, 3]].mean(0)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE)

    # The reference's mean over GPUs of each one's mean: 1 / (rows of the GPU).
    got = update_center(
        center, logits, momentum=0.0, row_weights=np.array([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    )
    want = (logits[:2].mean(0) + logits[2:].mean(0)) / 2
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=1e-7)


def test_center_stays_without_real_rows():
    center = jnp.array([0.5, -0.5, 0.0])
    got = update_center(
        center, cosine_logits(0, 5, 3), momentum=0.9, row_weights=np.zeros(5, np.float32)
    )
    np.testing.assert_array_equal(got, center)
