"""DINO losses: values, gradients, scales and the pairing of crops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses import diagnostics, dino
from dinov2_jax.losses.dino import num_loss_terms
from tests.parity import require
from tests.reference import golden_values, loops

TEMP = 0.1


@functools.partial(jax.jit, static_argnames=("num_terms",))
def dino_loss(student_logits, teacher_probs, *, num_terms):
    """Of logits: they are the products of themselves and the unit matrix."""
    return dino.dino_loss(
        student_logits,
        jnp.eye(student_logits.shape[-1]),
        teacher_probs,
        num_global_crops=teacher_probs.shape[-3],
        num_terms=num_terms,
        student_temp=TEMP,
    )


def dino_global_loss(student_logits, teacher_probs, *, num_terms):
    """The global crops' part, with the gradient of the whole, which has no other."""
    loss, parts = dino_loss(student_logits, teacher_probs, num_terms=num_terms)
    return parts["dino_global_loss"] + loss - jax.lax.stop_gradient(loss)


def dino_local_loss(student_logits, teacher_probs, *, num_terms):
    """The local crops' part likewise, beside global crops whose logits are constants."""
    logits = jnp.concatenate([jnp.ones(teacher_probs.shape), student_logits], axis=-3)
    loss, parts = dino_loss(logits, teacher_probs, num_terms=num_terms)
    return parts["dino_local_loss"] + loss - jax.lax.stop_gradient(loss)


def draw(seed: int, *, student_shape, teacher_shape):
    """Student logits, and teacher targets whose crops differ."""
    rng = np.random.default_rng(seed)
    student = rng.uniform(-1, 1, student_shape).astype(np.float32)
    teacher = rng.uniform(-1, 1, teacher_shape).astype(np.float32)
    exps = np.exp(teacher / 0.05)
    return student, exps / exps.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("num_local_crops", "expected"), [(8, 2 + 2 * 8), (2, 2 + 2 * 2), (1, 4), (0, 1 + 2)]
)
def test_num_loss_terms(num_local_crops, expected):
    assert num_loss_terms(num_global_crops=2, num_local_crops=num_local_crops) == expected


@pytest.mark.parametrize("num_local_crops", [1, 3, 8])
def test_local_loss_is_the_loop(num_local_crops):
    student, teacher = draw(0, student_shape=(num_local_crops, 4, 9), teacher_shape=(2, 4, 9))
    got = dino_local_loss(student, teacher, num_terms=18)
    np.testing.assert_allclose(got, loops.dino_local_loss(student, teacher, TEMP, 18), rtol=1e-5)


@pytest.mark.parametrize("num_global_crops", [2, 3])
def test_global_loss_is_the_loop(num_global_crops):
    shape = (num_global_crops, 4, 9)
    student, teacher = draw(1, student_shape=shape, teacher_shape=shape)
    got = dino_global_loss(student, teacher, num_terms=18)
    np.testing.assert_allclose(got, loops.dino_global_loss(student, teacher, TEMP, 18), rtol=1e-5)


def test_global_loss_pairs_each_crop_with_the_other():
    student, teacher = draw(2, student_shape=(2, 4, 9), teacher_shape=(2, 4, 9))
    loss = dino_global_loss(student, teacher, num_terms=1)
    same_crop = dino_global_loss(student, teacher[::-1], num_terms=1)
    assert abs(loss - same_crop) > 1e-2


def test_leading_axes_are_averaged_over():
    """Groups in front give the same number as one batch of all images."""
    student, teacher = draw(3, student_shape=(3, 2, 4, 9), teacher_shape=(3, 2, 4, 9))
    as_batch = [np.moveaxis(x, 0, 1).reshape(2, 12, 9) for x in (student, teacher)]
    for loss in (dino_local_loss, dino_global_loss):
        got = loss(student, teacher, num_terms=6)
        want = loss(*as_batch, num_terms=6)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_no_local_crops_is_zero():
    student, teacher = draw(4, student_shape=(0, 4, 9), teacher_shape=(2, 4, 9))
    got, grad = jax.value_and_grad(dino_local_loss)(jnp.asarray(student), teacher, num_terms=3)
    assert got == 0 and got.dtype == jnp.float32 and grad.shape == (0, 4, 9)


def test_golden_value_and_gradient():
    golden = golden_values.arrays("heads_losses.npz")
    student = jnp.asarray(golden["dino/student"].reshape(2, 8, 512))
    value, grad = jax.value_and_grad(dino_local_loss)(student, golden["dino/targets"], num_terms=1)
    np.testing.assert_allclose(value, golden["dino/loss_two_crops_all_pairs"], rtol=1e-5)
    want = golden["dino/grad"]
    np.testing.assert_allclose(
        grad.reshape(16, 512), want, rtol=1e-4, atol=1e-6 * np.abs(want).max()
    )


@pytest.mark.parity
def test_reference_value_and_gradient():
    """Scales as in dinov2/train/ssl_meta_arch.py lines 281-312, teacher crops swapped as there."""
    torch, losses = require("torch", "dinov2.loss")
    reference = losses.DINOLoss(20)
    local, teacher = draw(5, student_shape=(3, 4, 20), teacher_shape=(2, 4, 20))
    crops, _ = draw(6, student_shape=(2, 4, 20), teacher_shape=(2, 4, 20))
    terms = num_loss_terms(num_global_crops=2, num_local_crops=3)
    swapped = torch.tensor(teacher[::-1].copy())

    torch_local = torch.tensor(local.reshape(12, 20), requires_grad=True)
    want = reference(torch_local.chunk(3), swapped) / terms
    want.backward()
    got, grad = jax.value_and_grad(dino_local_loss)(jnp.asarray(local), teacher, num_terms=terms)
    np.testing.assert_allclose(got, want.item(), rtol=1e-5)
    np.testing.assert_allclose(grad.reshape(12, 20), torch_local.grad, rtol=1e-4, atol=1e-7)

    torch_global = torch.tensor(crops.reshape(8, 20), requires_grad=True)
    want = reference([torch_global], [swapped.flatten(0, 1)]) * 2 / terms
    want.backward()
    got, grad = jax.value_and_grad(dino_global_loss)(jnp.asarray(crops), teacher, num_terms=terms)
    np.testing.assert_allclose(got, want.item(), rtol=1e-5)
    np.testing.assert_allclose(grad.reshape(8, 20), torch_global.grad, rtol=1e-4, atol=1e-7)


def test_scale_at_initialisation():
    """Uniform outputs: every pair costs ln k; locals weigh 16/18 and globals 2/18."""
    k = 131_072
    uniform = jnp.full((2, 2, k), 1 / k)
    features, weight = jnp.zeros((10, 2, 1)), jnp.zeros((k, 1))
    settings = dict(num_global_crops=2, num_terms=18, student_temp=TEMP)
    loss, parts = dino.dino_loss(features, weight, uniform, **settings)
    np.testing.assert_allclose(parts["dino_local_loss"], np.log(k) * 16 / 18, rtol=1e-5)
    np.testing.assert_allclose(parts["dino_global_loss"], np.log(k) * 2 / 18, rtol=1e-5)
    np.testing.assert_allclose(loss, np.log(k), rtol=1e-5)
    np.testing.assert_allclose(parts["student_entropy"], 1.0, rtol=1e-5)


def test_the_loss_is_the_sum_of_its_parts():
    student, teacher = draw(7, student_shape=(3, 5, 4, 9), teacher_shape=(3, 2, 4, 9))
    loss, parts = dino_loss(student, teacher, num_terms=8)
    want = parts["dino_global_loss"] + parts["dino_local_loss"]
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    probs = jax.nn.softmax(student[:, :2] / TEMP).reshape(-1, 9)
    entropy = diagnostics.entropy_over_log_k(probs)
    np.testing.assert_allclose(parts["student_entropy"], entropy, rtol=1e-5)
