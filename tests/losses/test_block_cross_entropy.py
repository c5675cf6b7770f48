"""Cross-entropy in blocks: value and gradients, and the same by kernels and on eight devices.

Kernels are interpreted here; tests/losses/test_prototype_kernels.py compiles them for TPUs. What
the programs hold and move: test_prototype_programs.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses import block_targets
from dinov2_jax.losses.block_cross_entropy import block_cross_entropy
from dinov2_jax.losses.blocks import Layout
from dinov2_jax.models.heads import cosine_logits, weight_norm
from dinov2_jax.sharding import make_mesh
from tests.losses.block_cases import (
    TEMP,
    TOLERANCE,
    assert_same,
    block_loss,
    dense_loss,
    draw,
    make_prototypes,
    same,
    to_crops,
    unit_vectors,
    value_and_grads,
)


@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
@pytest.mark.parametrize("kind", ["sinkhorn_knopp", "softmax_center"])
@pytest.mark.parametrize(
    ("assign", "row_shape", "k"),
    [
        (same, (2, 5), 48),
        (same, (2, 60), 6),  # rows >> K
        (same, (1, 3), 35),  # the nearest divisor to 4 is 5
        (to_crops, (2, 2, 3), 24),
    ],
)
def test_value_and_gradients_are_the_dense_ones(kind, assign, row_shape, k, has_kernels):
    case = draw(row_shape=row_shape, k=k, assign=assign)
    settings = dict(kind=kind, assign=assign)
    assert_same(
        value_and_grads(block_loss, case, has_kernels=has_kernels, **settings),
        value_and_grads(dense_loss, case, **settings),
    )


@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
def test_padding_rows_have_no_gradient(has_kernels):
    case = draw(row_shape=(2, 9), k=12)
    settings = dict(kind="sinkhorn_knopp", assign=same, has_kernels=has_kernels)
    _, grads = value_and_grads(block_loss, case, **settings)
    is_zero = np.abs(grads[0]).max(axis=-1) == 0
    np.testing.assert_array_equal(is_zero, ~case["is_real"])


@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
def test_an_unused_prototype_and_large_logits(has_kernels):
    case = draw(row_shape=(2, 9), k=12)
    # Opposite to all rows, 80 / 0.05 temperatures below their best: exp is 0 for every row.
    case["teacher"] = np.abs(case["teacher"])
    weight_v, weight_g = case["teacher_prototypes"].weight_v, case["teacher_prototypes"].weight_g
    weight_v[4], weight_g[4] = -1.0, 80.0
    case["teacher_prototypes"] = make_prototypes(weight_v, weight_g)
    case["student_prototypes"].weight_g[:] *= 40.0
    settings = dict(kind="sinkhorn_knopp", assign=same)
    got = value_and_grads(block_loss, case, has_kernels=has_kernels, **settings)
    assert_same(got, value_and_grads(dense_loss, case, **settings))


@jax.custom_jvp
def rounded(x):
    """To bfloat16 and back, with the gradient of the identity."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


rounded.defjvps(lambda tangent, _, x: tangent)


def rounded_logits(prototypes, features):
    """What a bfloat16 product with float32 sums means, with gradients that are not rounded."""
    weight = rounded(weight_norm(prototypes.weight_v, prototypes.weight_g))
    return jnp.einsum("...d,kd->...k", rounded(features), weight)


def test_bfloat16_products_keep_float32_sums_and_gradients():
    case = draw(row_shape=(2, 5), k=24, dtype=jnp.bfloat16)
    settings = dict(kind="sinkhorn_knopp", assign=same)
    got = value_and_grads(block_loss, case, **settings)
    assert {leaf.dtype for leaf in got[1]} == {jnp.dtype(jnp.float32)}
    assert_same(got, value_and_grads(dense_loss, case, logits=rounded_logits, **settings))
    # The dense form rounds its two gradients to bfloat16 on the way.
    dense = value_and_grads(dense_loss, case, **settings)
    np.testing.assert_allclose(got[0], dense[0], rtol=TOLERANCE)
    assert_same((dense[0], got[1]), dense, tolerance=2**-8)
    # The kernels round what those are made of, once.
    by_kernels = value_and_grads(block_loss, case, has_kernels=True, **settings)
    np.testing.assert_allclose(by_kernels[0], dense[0], rtol=TOLERANCE)
    assert_same((got[0], by_kernels[1]), got, tolerance=2**-8)


def test_entropy_is_that_of_the_student():
    case = draw(row_shape=(2, 5), k=24)
    _, entropy = jax.jit(functools.partial(block_loss, kind="softmax_center", assign=same))(
        case["student"], case["student_prototypes"], case
    )
    log_probs = jax.nn.log_softmax(case["student_prototypes"].logits(case["student"]) / 0.1)
    np.testing.assert_allclose(entropy, -(jnp.exp(log_probs) * log_probs).sum(-1), rtol=1e-5)


def test_targets_and_temperatures_are_constants():
    case = draw(row_shape=(2, 5), k=12)

    def total(teacher_rows, temps):
        layout = Layout(3)
        rows, shared = block_targets.softmax_center(
            case["teacher"], case["teacher_prototypes"], case["center"], TEMP, layout=layout
        )
        return block_cross_entropy(
            layout,
            same,
            case["student"],
            case["student_prototypes"],
            rows.replace(row_max=rows.row_max + teacher_rows),
            shared,
            temps,
        )[0].sum()

    grads = jax.grad(total, (0, 1))(jnp.zeros((2, 5)), (0.1, TEMP))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
def test_both_passes_are_in_the_scope_that_profiles_know(has_kernels):
    case = draw(row_shape=(2, 5), k=24)
    run = functools.partial(block_loss, kind="softmax_center", assign=same, has_kernels=has_kernels)
    run = jax.jit(jax.grad(run, (0, 1), has_aux=True))
    lowered = run.lower(case["student"], case["student_prototypes"], case)
    text = lowered.as_text(debug_info=True)
    for scope in ("jvp(prototypes)", "transpose(jvp(prototypes))"):
        assert f'"jit(block_loss)/{scope}/' in text


@pytest.mark.parametrize(
    ("kind", "assign", "row_shape", "k"),
    [
        ("sinkhorn_knopp", same, (8, 5), 32),  # on the second mesh fsdp cuts the rows,
        ("sinkhorn_knopp", to_crops, (8, 2, 2), 96),  # and here the prototypes
        ("softmax_center", same, (8, 2), 48),
    ],
)
@pytest.mark.parametrize(
    "axes",
    [dict(data=8), dict(data=2, fsdp=2, model=2), dict(data=1, fsdp=1, model=8)],
    ids=str,
)
@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
def test_eight_devices_are_one(kind, assign, row_shape, k, axes, has_kernels):
    case = draw(row_shape=row_shape, k=k, assign=assign)
    settings = dict(kind=kind, assign=assign)
    want = value_and_grads(dense_loss, case, **settings)
    with jax.set_mesh(make_mesh(**axes)):
        got = value_and_grads(block_loss, case, has_kernels=has_kernels, **settings)
    assert_same(got, want)


def test_logits_of_prototypes_are_the_heads():
    rng = np.random.default_rng(0)
    features, weight_v = unit_vectors(rng, 2, 5, 8), rng.normal(size=(12, 8)).astype(np.float32)
    weight_g = rng.uniform(0.5, 1.5, (12, 1)).astype(np.float32)
    want = cosine_logits(features, weight_v, weight_g, dtype=jnp.float32)
    got = make_prototypes(weight_v, weight_g).logits(features)
    np.testing.assert_array_equal(got, want)
