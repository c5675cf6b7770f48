"""Cross-entropy in blocks: value, gradients, memory, and the same by kernels and on eight devices.

Kernels are interpreted here; tests/losses/test_prototype_kernels.py compiles them for TPUs.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses import block_targets, dino
from dinov2_jax.losses.block_cross_entropy import block_cross_entropy
from dinov2_jax.losses.blocks import Layout, choose_layout
from dinov2_jax.models.heads import cosine_logits, weight_norm
from dinov2_jax.sharding import make_mesh
from tests.losses.block_cases import (
    TEMP,
    cross_entropy,
    dense_targets,
    draw_prototypes,
    make_prototypes,
    unit_vectors,
)

STUDENT_TEMP = 0.1
TOLERANCE = 1e-5  # float32 sums in another order: of the largest entry, for gradients


same = None  # iBOT: a student's row has its own target


def to_crops(probs):
    """DINO: two global and three local crops."""
    return dino.targets_of_crops(probs, num_local_crops=3)


def draw(seed=0, *, row_shape, k, dtype=jnp.float32, assign=same, width=8):
    """Student and teacher features and prototypes, real rows and the loss weights of rows."""
    rng = np.random.default_rng(seed)
    student_shape = row_shape if assign is same else (row_shape[0], 5, row_shape[2])
    is_real = rng.random(row_shape) < 0.7 if assign is same else np.ones(row_shape, bool)
    weights = rng.uniform(0, 1, student_shape).astype(np.float32)
    return dict(
        student=unit_vectors(rng, *student_shape, width),
        teacher=unit_vectors(rng, *row_shape, width),
        student_prototypes=draw_prototypes(rng, k, width, dtype=dtype),
        teacher_prototypes=draw_prototypes(rng, k, width, dtype=dtype),
        center=rng.uniform(-0.3, 0.3, k).astype(np.float32),
        is_real=is_real,
        weights=weights * is_real if assign is same else weights,
    )


def head_logits(prototypes, features):
    """As the head's last layer has them, through which the norms are differentiated too."""
    directions, lengths = prototypes.weight_v, prototypes.weight_g
    return cosine_logits(features, directions, lengths, dtype=prototypes.dtype)


def dense_loss(student, prototypes, case, *, kind, assign, logits=head_logits):
    teacher_logits = case["teacher_prototypes"].logits(case["teacher"])
    probs = dense_targets(kind, teacher_logits, center=case["center"], is_real=case["is_real"])
    loss = cross_entropy(
        logits(prototypes, student), assign(probs) if assign else probs, STUDENT_TEMP
    )
    return (case["weights"] * loss).sum()


def block_loss(student, prototypes, case, *, kind, assign, block_size=4, has_kernels=False):
    teacher, teacher_prototypes = case["teacher"], case["teacher_prototypes"]
    k, width = prototypes.weight_v.shape
    layout = choose_layout(
        teacher.shape[:-1], k, width=width, block_size=block_size, has_kernels=has_kernels
    )
    if kind == "softmax_center":
        targets = block_targets.softmax_center(
            teacher, teacher_prototypes, case["center"], TEMP, layout=layout
        )
    else:
        targets = block_targets.sinkhorn_knopp(
            teacher, teacher_prototypes, TEMP, is_real=case["is_real"], num_iters=3, layout=layout
        )
    temps = (STUDENT_TEMP, TEMP)
    loss, entropy = block_cross_entropy(layout, assign, student, prototypes, *targets, temps)
    return (case["weights"] * loss).sum(), entropy


def value_and_grads(function, case, **settings):
    has_aux = function is block_loss
    run = jax.jit(
        jax.value_and_grad(functools.partial(function, **settings), (0, 1), has_aux=has_aux)
    )
    value, grads = run(case["student"], case["student_prototypes"], case)
    features, prototypes = grads
    return (value[0] if has_aux else value), [features, prototypes.weight_v, prototypes.weight_g]


def assert_same(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    for name, left, right in zip(
        ("features", "weight_v", "weight_g"), got[1], want[1], strict=True
    ):
        scale = np.abs(right).max()
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * scale, err_msg=name)


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


def memory(k: int, *, row_shape=(2, 40), width=8):
    """Bytes of temporaries of value and gradients, and of the results."""
    case = draw(row_shape=row_shape, k=k, width=width)
    run = functools.partial(block_loss, kind="sinkhorn_knopp", assign=same, block_size=64)
    run = jax.jit(jax.grad(run, (0, 1), has_aux=True))
    compiled = run.lower(case["student"], case["student_prototypes"], case).compile()
    return compiled.memory_analysis()


def test_memory_does_not_grow_with_the_prototypes():
    small, large = memory(4096), memory(32_768)
    growth = large.temp_size_in_bytes - small.temp_size_in_bytes
    vector = 4 * (32_768 - 4096)
    gradient = vector * (8 + 1 + 1)  # of directions and lengths, and zeros for the norms
    assert large.output_size_in_bytes - small.output_size_in_bytes == gradient
    # The gradient before it is handed over, and a few vectors [k]. One [rows, k] is 80 vectors.
    assert growth <= gradient + 4 * vector


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


def collectives(program: str) -> list[tuple[str, int]]:
    """Kind and largest result, in elements, of each collective of a compiled program."""
    found = []
    pattern = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
    for result, kind in re.findall(pattern, program):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        found.append((kind, max(np.prod([int(n) for n in s.split(",") if n]) for s in shapes)))
    return found


def test_prototypes_stay_where_they_are():
    """Nothing as large as a device's prototypes moves, but the sum of their gradient over data."""
    mesh = make_mesh(data=2, fsdp=2, model=2)
    k, width = 4096, 8
    case = draw(row_shape=(8, 2), k=k, width=width)
    stored = jax.NamedSharding(mesh, jax.P(("model", "fsdp")))
    batch = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    shardings = {
        name: stored if "prototypes" in name or name == "center" else batch for name in case
    }
    case = jax.device_put(case, shardings)
    run = functools.partial(block_loss, kind="sinkhorn_knopp", assign=same, block_size=64)
    run = jax.jit(jax.grad(run, (0, 1), has_aux=True), out_shardings=((batch, stored), batch))
    with jax.set_mesh(mesh):
        args = case["student"], case["student_prototypes"], case
        program = run.lower(*args).compile().as_text()
    moved = collectives(program)
    assert {"all-gather", "all-reduce"} <= {kind for kind, _ in moved}
    assert not {"all-to-all", "collective-permute"} & {kind for kind, _ in moved}
    local = k * width // 4
    assert [kind for kind, size in moved if size >= local] == ["all-reduce"]
    # Nor are they copied to be cut into blocks.
    copies = re.findall(r"f32\[([\d,]+)\]\S* (?:copy|transpose)\(", program)
    assert max([np.prod([int(n) for n in s.split(",")]) for s in copies], default=0) < local


def test_logits_of_prototypes_are_the_heads():
    rng = np.random.default_rng(0)
    features, weight_v = unit_vectors(rng, 2, 5, 8), rng.normal(size=(12, 8)).astype(np.float32)
    weight_g = rng.uniform(0.5, 1.5, (12, 1)).astype(np.float32)
    want = cosine_logits(features, weight_v, weight_g, dtype=jnp.float32)
    got = make_prototypes(weight_v, weight_g).logits(features)
    np.testing.assert_array_equal(got, want)
