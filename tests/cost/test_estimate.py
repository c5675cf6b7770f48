"""The estimate's formula, term by term."""

import pytest

from dinov2_jax.cost.chips import TPUS
from dinov2_jax.cost.estimate import estimate, kernel_seconds, part_of
from dinov2_jax.cost.hlo import Program
from tests.cost.test_hlo import TEXT

V5E = TPUS["v5e"]


def test_the_formula():
    step = estimate(Program(TEXT), V5E)
    cycles = (12 + 3 + 1) * 1000 + 50
    gathered = 128 * 384 * 4 * 3 / 4
    reduced = 12 * (8 * 128 * 2 + 16 * 4) * 2 * 3 / 4
    scattered = 8 * 128 * 4 * 1 / 2 + 64 * 4 * 3 / 4
    between_slices = 2 * 8 * 128 * 2 / V5E.dcn_bandwidth
    assert step.seconds == pytest.approx(
        cycles / 1.5e9 + (gathered + reduced + scattered) / V5E.ring_bandwidth + between_slices
    )
    table = step.table()
    assert table["mlp"] == {"products": pytest.approx(16_000 / 1.5e9)}
    assert table["not named"] == {"copies": pytest.approx(50 / 1.5e9)}
    assert step.rows == sorted(step.rows, key=lambda row: -row.seconds)


def test_what_is_left_out_is_said():
    kernel, loop = estimate(Program(TEXT), V5E).warnings
    assert "kernel.1" in kernel and "count as nothing" in kernel
    assert "while.3" in loop and "count once" in loop


def test_bytes_by_kind():
    moved = estimate(Program(TEXT), V5E).collective_bytes
    assert moved["all-reduce"] == 12 * (8 * 128 * 2 + 16 * 4)


@pytest.mark.parametrize(("flops", "num_bytes"), [(197e12, 0), (0, 819e9), (197e12, 1)])
def test_kernels_count_by_the_roofline(flops, num_bytes):
    stated = f'{{"cost_estimate":{{"flops":"{flops:.0f}","bytes_accessed":"{num_bytes:.0f}"}}}}'
    assert kernel_seconds(stated, V5E) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(train_step)/augment/augment/while/body/mul", "augmentation"),
        ("jit(train_step)/teacher/targets/nk,n->k/dot_general", "targets"),
        ("a/transpose(jvp(DINOHead))/head/mlp/0/dot_general", "heads"),
        ("a/backbone/while/body/closed_call/blocks/attn/qkv/dot_general", "attention products"),
        ("a/backbone/while/body/closed_call/blocks/attn/bhnm/dot_general", "attention"),
        ("a/backbone/while/body/closed_call/blocks/mlp/w12/dot_general", "mlp"),
        ("a/backbone/while/body/closed_call/blocks/norm1/mul", "blocks, the rest"),
        ("a/backbone/while/body/dynamic_update_slice", "blocks, the rest"),
        ("a/backbone/VisionTransformer.embed/add", "embedding"),
        ("jit(train_step)/optimizer/sqrt", "update"),
        ("jit(train_step)/ema/mul", "update"),
        ("jit(train_step)/jit(_where)/select_n", "update"),
        ("jit(train_step)/student/jvp()/reduce_sum", "losses and metrics"),
        ("", "not named"),
    ],
)
def test_parts(scope, part):
    assert part_of(scope) == part
