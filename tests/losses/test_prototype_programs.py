"""What the compiled prototype losses hold and move: nothing of rows times prototypes.

On several devices prototypes stay where they are, and what is gathered instead is small.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses.head_modes import DenseHeads
from dinov2_jax.models.heads import DINOHead, Head
from dinov2_jax.sharding import make_mesh, tree_sharding
from tests.losses.block_cases import block_loss, draw, same, to_crops


def lower(mesh, *, k: int, row_shape, width=8, assign=same):
    """The gradient in blocks of 64, lowered for prototypes and rows that lie as in a run."""
    case = draw(row_shape=row_shape, k=k, width=width, assign=assign)
    model = tuple(axis for axis in ("model", "fsdp") if mesh.shape[axis] > 1)
    stored = jax.NamedSharding(mesh, jax.P(model))
    batch = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    shardings = {
        name: stored if "prototypes" in name or name == "center" else batch for name in case
    }
    case = jax.device_put(case, shardings)
    run = functools.partial(block_loss, kind="sinkhorn_knopp", assign=assign, block_size=64)
    run = jax.jit(jax.grad(run, (0, 1), has_aux=True), out_shardings=((batch, stored), batch))
    with jax.set_mesh(mesh):
        return run.lower(case["student"], case["student_prototypes"], case)


@pytest.mark.parametrize(
    ("assign", "row_shape"), [(same, (8, 40)), (to_crops, (8, 2, 20))], ids=["ibot", "dino"]
)
@pytest.mark.parametrize("axes", [dict(data=1), dict(data=4, model=2)], ids=str)
def test_memory_does_not_grow_with_the_prototypes(assign, row_shape, axes):
    devices = jax.devices()[: math.prod(axes.values())]
    mesh = make_mesh(**axes, devices=devices)
    small, large = (
        lower(mesh, k=k, row_shape=row_shape, assign=assign).compile().memory_analysis()
        for k in (4096, 32_768)
    )
    growth = large.temp_size_in_bytes - small.temp_size_in_bytes
    vector = 4 * (32_768 - 4096) // axes.get("model", 1)  # [k], of what a device has of them
    gradient = vector * (8 + 1 + 1)  # of directions and lengths, and zeros for the norms
    assert large.output_size_in_bytes - small.output_size_in_bytes == gradient
    # The gradient before it is handed over, and a few vectors [k], over data one more: that of the
    # lengths is summed to a place of its own. One [rows, k] would be at least 80.
    few = 4 + (mesh.size > 1)
    assert growth <= gradient + few * vector, (growth - gradient) / vector


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
    k, width = 4096, 8
    mesh = make_mesh(data=2, fsdp=2, model=2)
    program = lower(mesh, k=k, row_shape=(8, 2), width=width).compile().as_text()
    moved = collectives(program)
    assert {"all-gather", "all-reduce"} <= {kind for kind, _ in moved}
    assert not {"all-to-all", "collective-permute"} & {kind for kind, _ in moved}
    local = k * width // 4
    assert [kind for kind, size in moved if size >= local] == ["all-reduce"]
    # Nor are they copied to be cut into blocks.
    copies = re.findall(r"f32\[([\d,]+)\]\S* (?:copy|transpose)\(", program)
    assert max([np.prod([int(n) for n in s.split(",")]) for s in copies], default=0) < local


def dense_gradient(heads, module, *, centering: str, assign):
    """Gradient for the student and its features of DINO (`assign`: to crops) or iBOT's loss."""

    def loss(student, features, teacher, teacher_features, center):
        teacher_head, student_head = Head(module, teacher), Head(module, student)
        target, center = heads.targets(
            teacher_head,
            heads.rows(teacher_head, teacher_features),
            is_real=jnp.ones(teacher_features.shape[:-1], bool),
            center=center,
            temp=jnp.float32(0.07),
            centering=centering,
            num_sinkhorn_iters=3,
            center_momentum=0.9,
        )
        if assign is same:
            weights = jnp.ones(features.shape[:-1])
            settings = dict(num_crops=1, student_temp=0.1)
            total = heads.ibot_loss(student_head, features, target, weights, **settings)
            return total, center
        settings = dict(num_global_crops=2, num_terms=8, student_temp=0.1)
        return heads.dino_loss(student_head, features, target, **settings)[0], center

    return jax.grad(loss, (0, 1), has_aux=True)


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "softmax_center"])
@pytest.mark.parametrize(
    ("assign", "row_shape"), [(same, (8, 20)), (to_crops, (8, 2, 10))], ids=["ibot", "dino"]
)
@pytest.mark.parametrize(
    "axes", [dict(data=4, model=2), dict(data=2, fsdp=2, model=2), dict(data=1, model=8)], ids=str
)
def test_dense_heads_move_neither_logits_nor_prototypes_over_model(
    assign, row_shape, axes, centering
):
    """Of prototypes a device sees its share on `model`, the largest that any collective makes."""
    k, width, d = 4096, 8, 16
    mesh = make_mesh(**axes)
    module = DINOHead(num_prototypes=k, bottleneck_dim=width, num_layers=1)
    batch = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))

    def features(shape):
        return jax.ShapeDtypeStruct((*shape, d), jnp.float32, sharding=batch)

    tree = jax.eval_shape(
        lambda: dict(
            params=module.init(jax.random.key(0), jnp.zeros((1, d)))["params"],
            centers=jnp.zeros(k),
        )
    )
    stored = tree_sharding(tree, mesh, min_size_to_shard_mb=0.0)
    placed = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, stored
    )
    params, center = placed["params"], placed["centers"]
    student_shape = row_shape if assign is same else (row_shape[0], 5, row_shape[2])
    run = jax.jit(
        dense_gradient(DenseHeads(), module, centering=centering, assign=assign),
        out_shardings=((stored["params"], batch), stored["centers"]),
    )
    with jax.set_mesh(mesh):
        arguments = params, features(student_shape), params, features(row_shape), center
        moved = collectives(run.lower(*arguments).compile().as_text())
    assert moved
    # Any logits are more: a device has at least 20 rows, and the features' width is 8.
    assert max(size for _, size in moved) <= k * width // axes["model"], moved
