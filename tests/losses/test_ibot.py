"""iBOT loss: per-crop weights, padding, and crops without a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses import ibot
from tests.parity import require
from tests.reference import golden_values, loops

TEMP = 0.1


@functools.partial(jax.jit, static_argnames=("student_temp", "num_crops"))
def ibot_loss(student_logits, teacher_probs, mask_weights, *, student_temp, num_crops):
    """Of logits: they are the products of themselves and the unit matrix."""
    return ibot.ibot_loss(
        student_logits,
        jnp.eye(student_logits.shape[-1]),
        teacher_probs,
        mask_weights,
        student_temp=student_temp,
        num_crops=num_crops,
    )


def draw(masks: np.ndarray, k: int = 9):
    """Logits, targets and weights of the masked patches of `masks [i, n]`."""
    rng = np.random.default_rng(0)
    num_masked = masks.sum()
    student = rng.uniform(-1, 1, (num_masked, k)).astype(np.float32)
    exps = np.exp(rng.uniform(-1, 1, (num_masked, k)).astype(np.float32) / 0.05)
    weights = np.repeat(1 / np.maximum(masks.sum(1), 1), masks.sum(1)).astype(np.float32)
    return student, exps / exps.sum(-1, keepdims=True), weights


MASKS = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]], bool)


def test_value_is_the_loop():
    student, teacher, weights = draw(MASKS)
    got = ibot_loss(student, teacher, weights, student_temp=TEMP, num_crops=len(MASKS))
    np.testing.assert_allclose(got, loops.ibot_loss(student, teacher, MASKS, TEMP), rtol=1e-5)


def test_padding_changes_nothing():
    student, teacher, weights = draw(MASKS)
    padding = np.full((5, 9), 3.0, np.float32)

    def loss(student, teacher, weights):
        return ibot_loss(student, teacher, weights, student_temp=TEMP, num_crops=4)

    value, grad = jax.value_and_grad(loss)(jnp.asarray(student), teacher, weights)
    padded_value, padded_grad = jax.value_and_grad(loss)(
        jnp.concatenate([student, padding]),
        np.concatenate([teacher, 0 * padding]),
        np.r_[weights, np.zeros(5, np.float32)],
    )
    np.testing.assert_allclose(padded_value, value, rtol=1e-6)
    np.testing.assert_allclose(padded_grad[:-5], grad, rtol=1e-6)
    np.testing.assert_array_equal(padded_grad[-5:], 0)


def test_no_masked_patches_is_zero():
    value, grad = jax.value_and_grad(ibot_loss)(
        jnp.ones((6, 9)), jnp.zeros((6, 9)), jnp.zeros(6), student_temp=TEMP, num_crops=4
    )
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_golden_value_and_gradient():
    golden = golden_values.arrays("heads_losses.npz")
    value, grad = jax.value_and_grad(ibot_loss)(
        jnp.asarray(golden["ibot/student"]),
        golden["ibot/targets"],
        golden["ibot/weights"],
        student_temp=TEMP,
        num_crops=len(golden["ibot/mask"]),
    )
    np.testing.assert_allclose(value, golden["ibot/loss"], rtol=1e-5)
    want = golden["ibot/grad"]
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())


@pytest.mark.parity
def test_reference_value_and_gradient():
    torch, losses = require("torch", "dinov2.loss")
    student, teacher, weights = draw(MASKS, k=20)
    rows = torch.tensor(student, requires_grad=True)
    want = losses.iBOTPatchLoss(20).forward_masked(
        rows,
        torch.tensor(teacher),
        student_masks_flat=torch.tensor(MASKS),
        n_masked_patches=len(student),
        masks_weight=torch.tensor(weights),
    )
    want.backward()
    got, grad = jax.value_and_grad(ibot_loss)(
        jnp.asarray(student), teacher, weights, student_temp=TEMP, num_crops=len(MASKS)
    )
    np.testing.assert_allclose(got, want.item(), rtol=1e-5)
    np.testing.assert_allclose(grad, rows.grad, rtol=1e-4, atol=1e-7)
