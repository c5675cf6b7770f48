"""Losses against their formulas, loops and PyTorch's derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.evals.dense.losses import cross_entropy, depth_loss, gradient_loss, sig_loss
from tests.parity import require


def depths(batch=4, size=(9, 11), seed=0):
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.5, 9, (batch, *size)).astype(np.float32)
    depth[rng.random(depth.shape) < 0.3] = 0
    return rng.uniform(0.5, 9, (batch, *size)).astype(np.float32), depth


def test_sig_loss_is_its_formula():
    predicted, depth = depths()
    g = (np.log(predicted + 1e-3) - np.log(depth + 1e-3))[depth > 0].astype(np.float64)
    whole = np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    np.testing.assert_allclose(sig_loss(predicted, depth, is_warmup=False), whole, rtol=1e-5)
    without_variance = np.sqrt(0.15) * abs(g.mean())
    found = sig_loss(predicted, depth, is_warmup=True)
    np.testing.assert_allclose(found, without_variance, rtol=1e-5)


def test_a_crop_without_depth_moves_nothing():
    predicted, depth = depths()
    for loss in (functools.partial(sig_loss, is_warmup=False), gradient_loss):
        value, slope = jax.jit(jax.value_and_grad(loss))(predicted, np.zeros_like(depth))
        assert value == 0
        assert not np.asarray(slope).any()


def test_the_first_hundred_steps_are_without_variance():
    maps, depth = depths(batch=2)
    for step, is_warmup in ((0, True), (99, True), (100, False)):
        found = depth_loss(maps, depth, np.int32(step), images_per_loss=0)
        expected = sig_loss(maps, depth, is_warmup=is_warmup)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    shorter = depth_loss(maps, depth, np.int32(7), images_per_loss=0, warmup_steps=7)
    np.testing.assert_allclose(shorter, found, rtol=1e-6)


def test_groups_are_the_references_gpus():
    maps, depth = depths(batch=4)
    pairs = [sig_loss(maps[i : i + 2], depth[i : i + 2], is_warmup=False) for i in (0, 2)]
    found = depth_loss(maps, depth, np.int32(500), images_per_loss=2)
    np.testing.assert_allclose(found, np.mean(pairs), rtol=1e-6)
    whole = depth_loss(maps, depth, np.int32(500), images_per_loss=0)
    assert abs(whole - found) > 1e-4


def test_gradient_loss_is_its_loop():
    predicted, depth = depths(batch=2, size=(13, 14))
    expected = 0.0
    for stride in (1, 2, 4, 6):
        p, t = predicted[:, ::stride, ::stride], depth[:, ::stride, ::stride]
        g, total = np.log(p + 1e-3) - np.log(t + 1e-3), 0.0
        for image in range(2):
            for y in range(p.shape[1]):
                for x in range(p.shape[2]):
                    for dy, dx in ((2, 0), (0, 2)):
                        if y + dy < p.shape[1] and x + dx < p.shape[2]:
                            ends = (image, y, x), (image, y + dy, x + dx)
                            if min(t[ends[0]], t[ends[1]]) > 0:
                                total += abs(g[ends[0]] - g[ends[1]])
        expected += total / (t > 0).sum()
    np.testing.assert_allclose(gradient_loss(predicted, depth), expected, rtol=1e-5)
    maps = (jnp.asarray(predicted), depth, np.int32(500))
    with_it = depth_loss(*maps, gradient_weight=0.5, images_per_loss=0)
    without = depth_loss(*maps, images_per_loss=0)
    np.testing.assert_allclose(with_it - without, expected / 2, rtol=1e-4)


@pytest.mark.parity
def test_depth_loss_has_pytorchs_value_and_slope():
    torch = require("torch")
    rng = np.random.default_rng(0)
    maps = rng.uniform(0.5, 9, (2, 4, 5)).astype(np.float32)
    _, depth = depths(batch=2, size=(15, 16))
    x = torch.tensor(maps, requires_grad=True)
    full = torch.nn.functional.interpolate(
        x[:, None], size=(15, 16), mode="bilinear", align_corners=False
    )[:, 0]
    target = torch.tensor(depth)
    g = torch.log(full[target > 0] + 1e-3) - torch.log(target[target > 0] + 1e-3)
    loss = torch.sqrt(torch.var(g) + 0.15 * torch.mean(g) ** 2)
    loss.backward()
    value, slope = jax.value_and_grad(depth_loss)(jnp.asarray(maps), depth, np.int32(100))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(slope, x.grad, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("over_all", [True, False])
def test_cross_entropy_has_pytorchs_value_and_slope(over_all):
    torch = require("torch")
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    classes = rng.integers(-1, 5, (2, 14, 19)).astype(np.int16)
    x = torch.tensor(logits.transpose(0, 3, 1, 2), requires_grad=True)
    full = torch.nn.functional.interpolate(x, size=(14, 19), mode="bilinear", align_corners=False)
    each = torch.nn.functional.cross_entropy(
        full, torch.tensor(classes.astype(np.int64)), ignore_index=-1, reduction="sum"
    )
    loss = each / (classes.size if over_all else (classes >= 0).sum())
    loss.backward()
    value, slope = jax.value_and_grad(cross_entropy)(
        jnp.asarray(logits), classes, over_all=over_all
    )
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(slope, x.grad.permute(0, 2, 3, 1), atol=1e-6)


def test_cross_entropy_of_nothing_labelled_is_zero():
    classes = np.full((1, 4, 4), -1, np.int16)
    assert cross_entropy(jnp.ones((1, 2, 2, 3)), classes, over_all=False) == 0
