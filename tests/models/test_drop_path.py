"""Stochastic depth: the laws of both modes, groups, and the reference's subset."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.models.drop_path import (
    DropPath,
    add_residual,
    choose_form,
    num_kept,
    put_rows,
    take_rows,
)
from tests.parity import require


def residuals(x, drop_path, key, branch=lambda rows: rows * 2.0):
    """What is added to each image: `[(s q), n, d]`."""
    added = add_residual(x, branch, drop_path=drop_path, make_key=lambda: key)
    return np.asarray(added - x)


@pytest.mark.parametrize(
    ("rows", "rate", "kept"),
    [(10, 0.4, 6), (10, 0.3, 7), (64, 0.4, 38), (7, 0.5, 3), (1, 0.9, 1), (3, 0.9, 1), (4, 0.0, 4)],
)
def test_num_kept(rows, rate, kept):
    assert num_kept(rows, rate) == kept


@pytest.mark.parametrize("rate", [0.4, 0.1])
def test_subset_keeps_and_scales_the_same_number_in_each_group(key, rate):
    groups, rows = 4, 10
    x = np.random.default_rng(0).standard_normal((groups * rows, 3, 2)).astype(np.float32)
    added = residuals(x, DropPath(rate, "subset", groups), key)
    is_kept = np.abs(added).max(axis=(1, 2)) > 0
    kept = num_kept(rows, rate)
    np.testing.assert_array_equal(is_kept.reshape(groups, rows).sum(axis=1), kept)
    np.testing.assert_allclose(added[is_kept], 2 * x[is_kept] * rows / kept, atol=1e-5)
    assert len({tuple(group) for group in is_kept.reshape(groups, rows)}) > 1, "groups draw alike"


def test_subset_computes_the_branch_for_the_kept_images_only(key):
    seen = []

    def branch(rows):
        seen.append(rows.shape)
        return rows

    residuals(np.ones((12, 3, 2), np.float32), DropPath(0.5, "subset", 2), key, branch)
    assert seen == [(6, 3, 2)]


def test_bernoulli_keeps_each_image_by_itself(key):
    groups, rows, rate = 50, 40, 0.25
    x = np.ones((groups * rows, 1, 1), np.float32)
    added = residuals(x, DropPath(rate, "bernoulli", groups), key)
    assert set(np.unique(added.round(5))) == {0.0, np.float32(2 / 0.75).round(5)}
    num = (added > 0).reshape(groups, rows).sum(axis=1)
    assert abs(num.mean() - 30) < 4 * np.sqrt(40 * 0.25 * 0.75 / groups)
    assert len(set(num)) > 5, "the number that is kept does not vary"


@pytest.mark.parametrize("mode", ["subset", "bernoulli"])
def test_expectation_is_the_whole_branch(key, mode):
    x = np.random.default_rng(0).standard_normal((10, 1, 2)).astype(np.float32)
    keys = jax.random.split(key, 4000)
    drop_path = DropPath(0.4, mode, 2)
    draws = jax.jit(
        jax.vmap(
            lambda k: add_residual(x, lambda rows: rows, drop_path=drop_path, make_key=lambda: k)
        )
    )(keys)
    np.testing.assert_allclose(draws.mean(axis=0), 2 * x, atol=5 * np.abs(x).max() / np.sqrt(4000))


@pytest.mark.parametrize("drop_path", [None, DropPath(0.0), DropPath(0.4, "subset", 3)])
def test_nothing_is_drawn_where_nothing_can_be_dropped(drop_path):
    def make_key():
        raise AssertionError("a key was asked for")

    x = np.ones((3, 1, 2), np.float32)  # one row in each of 3 groups: none can be left out
    added = add_residual(x, lambda rows: rows, drop_path=drop_path, make_key=make_key)
    np.testing.assert_array_equal(added, 2 * x)


def test_result_has_the_type_of_the_tokens_but_adds_in_float32(key):
    x = jnp.ones((5, 1, 1), jnp.bfloat16)
    # 1 + residual * 5 / 3 lies just above the middle of two bfloat16 numbers; with the residual,
    # or 5 / 3, rounded to bfloat16 it would lie below.
    residual = 230.49 * 2**-15
    out = add_residual(
        x,
        lambda rows: jnp.full(rows.shape, residual, jnp.float32),
        drop_path=DropPath(0.4),
        make_key=lambda: key,
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.unique(np.float32(out)), np.float32([1, 1 + 2**-6]))


def test_take_and_put_are_transposes_of_each_other():
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(5) for _ in range(3)])
    chosen, rank = order[:, :2], np.argsort(order, axis=1)
    x = rng.standard_normal((15, 2, 2)).astype(np.float32)
    y = rng.standard_normal((6, 2, 2)).astype(np.float32)
    taken, put_grad = jax.vjp(lambda a: take_rows(a, chosen, rank), x)
    placed, take_grad = jax.vjp(lambda a: put_rows(a, chosen, rank), y)
    expected = np.zeros_like(x)
    for group in range(3):
        for slot, row in enumerate(chosen[group]):
            np.testing.assert_array_equal(taken[2 * group + slot], x[5 * group + row])
            expected[5 * group + row] = y[2 * group + slot]
    np.testing.assert_array_equal(placed, expected)
    np.testing.assert_array_equal(put_grad(y)[0], placed)
    np.testing.assert_array_equal(take_grad(x)[0], taken)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_move_images_as_gathers_do(key, dtype):
    groups, rows = 3, 7
    x = jax.random.normal(jax.random.key(1), (groups * rows, 3, 4), dtype)
    weights = jax.random.normal(jax.random.key(2), (3, 4))

    def run(x, form):
        drop_path = DropPath(0.4, "subset", groups, form)
        branch = lambda kept: jnp.tanh(kept.astype(jnp.float32) * weights)  # noqa: E731
        return add_residual(x, branch, drop_path=drop_path, make_key=lambda: key)

    results = []
    for form in ("gather", "matmul"):
        out, vjp = jax.vjp(functools.partial(run, form=form), x)
        results.append((out, *vjp(jnp.cos(out))))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype == dtype
        np.testing.assert_array_equal(np.float32(ours), np.float32(expected))


def test_products_are_exact_where_float32_would_be_rounded(key):
    x = jnp.ones((6, 2, 2), jnp.bfloat16)
    drop_path = DropPath(0.5, form="matmul")
    program = jax.make_jaxpr(
        lambda x: add_residual(
            x, lambda rows: rows.astype(jnp.float32), drop_path=drop_path, make_key=lambda: key
        )
    )(x)
    dots = [str(eqn) for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    take, put = dots
    assert "HIGHEST" not in take and "HIGHEST" in put  # tokens are bfloat16, residuals float32


def test_scale_comes_after_the_move_and_changes_nothing_but_its_cost(key):
    x = jax.random.normal(jax.random.key(1), (12, 3, 4), jnp.bfloat16)
    gamma = jax.random.normal(jax.random.key(2), (4,))

    def scale(residual):
        return residual.astype(jnp.float32) * gamma

    for mode, form in (("subset", "gather"), ("subset", "matmul"), ("bernoulli", "gather")):
        drop_path = DropPath(0.5, mode, 2, form)
        add = functools.partial(add_residual, x, drop_path=drop_path, make_key=lambda: key)
        np.testing.assert_array_equal(
            np.float32(add(jnp.tanh, scale=scale)),
            np.float32(add(lambda kept: scale(jnp.tanh(kept)))),
        )
    moved = jax.make_jaxpr(
        lambda x: add_residual(
            x, jnp.tanh, scale=scale, drop_path=DropPath(0.5, form="matmul"), make_key=lambda: key
        )
    )(x)
    dots = [eqn for eqn in moved.eqns if eqn.primitive.name == "dot_general"]
    assert {var.aval.dtype for eqn in dots for var in eqn.invars} == {jnp.dtype("bfloat16")}


@pytest.mark.parity
@pytest.mark.parametrize("rate", [0.4, 0.75])
def test_reference_subset(monkeypatch, key, rate):
    torch, block = require("torch", "dinov2.layers.block")
    rows = 7
    x = np.random.default_rng(0).standard_normal((rows, 3, 4)).astype(np.float32)
    ours = residuals(x, DropPath(rate), key, branch=lambda kept: kept**2)
    # Which images are ours to choose, hence torch.randperm is given our choice.
    is_kept = np.abs(ours).max(axis=(1, 2)) > 0
    order = np.concatenate([np.flatnonzero(is_kept), np.flatnonzero(~is_kept)])
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.tensor(order))
    theirs = block.drop_add_residual_stochastic_depth(
        torch.tensor(x), residual_func=lambda kept: kept**2, sample_drop_ratio=rate
    )
    np.testing.assert_allclose(x + ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("form", "platform", "layer_norm", "expected"),
    [
        ("auto", "cpu", "xla", "gather"),
        ("auto", "gpu", "xla", "gather"),
        ("auto", "tpu", "pallas", "pallas"),
        ("auto", "tpu", "xla", "matmul"),
        ("gather", "tpu", "pallas", "gather"),
        ("pallas", "tpu", "pallas", "pallas"),
    ],
)
def test_the_choice_of_a_form(form, platform, layer_norm, expected):
    assert choose_form(form, platform, layer_norm) == expected


@pytest.mark.parametrize(("platform", "layer_norm"), [("cpu", "xla"), ("tpu", "xla")])
def test_kernels_need_a_tpu_and_the_kernel_of_layer_normalisation(platform, layer_norm):
    message = f"needs a TPU and layer_norm='pallas', not {platform} and 'xla'; use 'auto'"
    with pytest.raises(ValueError, match=message):
        choose_form("pallas", platform, layer_norm)


def test_errors(key):
    with pytest.raises(ValueError, match=r"drop_path_rate=1.0 must be in \[0, 1\); 0 turns"):
        DropPath(1.0)
    with pytest.raises(ValueError, match=r"drop_path_mode='batch' must be one of \('subset', 'be"):
        DropPath(0.1, "batch")
    with pytest.raises(ValueError, match=r"drop_path_form='roll' must be one of \('gather', 'matm"):
        DropPath(0.1, form="roll")
    with pytest.raises(ValueError, match=r"images=10 must be a multiple of num_groups=3; pass"):
        residuals(np.ones((10, 1, 1), np.float32), DropPath(0.1, "subset", 3), key)
