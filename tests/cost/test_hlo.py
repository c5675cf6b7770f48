"""Reading HLO: by hand-written programs, and by one that XLA made."""

import jax
import jax.numpy as jnp
import pytest

from dinov2_jax.cost.hlo import Program, array_bytes

# As the TPU compiler writes: a loop of 12 around a fusion that holds a product and a nested
# collective, a collective that is spread over two fusions, and a transfer between slices.
TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%fused.1 (p.1: bf16[8,128]) -> bf16[8,128] {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %inner = bf16[8,128]{1,0} add(%p.1, %p.1), backend_config={"estimated_cycles":"7"}
  ROOT %convolution.1 = bf16[8,128]{1,0} convolution(%inner, %p.1), dim_labels=bf_io->bf
}

%fused.2 (p.2: f32[32,384]) -> f32[128,384] {
  %p.2 = f32[32,384]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[128,384]{1,0:T(8,128)} all-gather(%p.2), channel_id=9, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%fused.3 (p.4: f32[32,384]) -> f32[128,384] {
  %p.4 = f32[32,384]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[128,384]{1,0:T(8,128)S(1)} all-gather(%p.4), channel_id=9, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%all-reduce-scatter.7 (p.3: f32[64]) -> f32[16] {
  %p.3 = f32[64]{0} parameter(0)
  %all-reduce.7 = f32[64]{0} all-reduce(%p.3), channel_id=2, \
replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)), {'axis_1'}, to_apply=%add
  ROOT %cut = f32[16]{0} dynamic-slice(%all-reduce.7, %p.3), dynamic_slice_sizes={16}
}

%body.1 (arg: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %arg = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0}) parameter(0)
  %fusion.1 = bf16[8,128]{1,0} fusion(%arg), kind=kOutput, calls=%fused.1, \
metadata={op_name="jit(step)/student/backbone/blocks/mlp/dot" stack_frame_id=3}, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %all-reduce.1 = (bf16[8,128]{1,0}, f32[16]{0}) all-reduce(%fusion.1, %arg), channel_id=2, \
replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %tuple.1 = (s32[], bf16[8,128]{1,0}) tuple(%arg, %fusion.1)
}

%condition.1 (arg.2: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%arg.2, %bound), direction=LT
}

%condition.2 (arg.3: (s32[], bf16[8,128])) -> pred[] {
  ROOT %lt.2 = pred[]{:T(512)} compare(%arg.3, %arg.3), direction=LT
}

ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %while.1 = (s32[], bf16[8,128]) while(%p), condition=%condition.1, body=%body.1
  %while.2 = (s32[], bf16[8,128]) while(%p), condition=%condition.2, body=%body.1, \
backend_config={"known_trip_count":{"n":"3"}}
  %while.3 = (s32[], bf16[8,128]) while(%p), condition=%condition.2, body=%body.1
  %spread.1 = f32[128,384]{1,0} fusion(%p), kind=kCustom, calls=%fused.2
  %spread.2 = f32[128,384]{1,0} fusion(%p), kind=kCustom, calls=%fused.3
  %scattered = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.7
  %reduce-scatter.1 = f32[4,128]{1,0} reduce-scatter(%p), channel_id=4, \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %send.1 = (bf16[8,128]{1,0}, u32[], token[]) send(%p, %t), channel_id=5, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %kernel.1 = bf16[8,128]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  %mark.1 = bf16[8,128]{1,0} custom-call(%p), custom_call_target="AllocateBuffer"
  ROOT %copy.1 = bf16[8,128]{0,1} copy(%p), backend_config={"estimated_cycles":"50"}
}
"""


def test_cycles_are_counted_as_often_as_loops_turn():
    program = Program(TEXT)
    counted = {(i.name, i.times): i.cycles for i in program.costed()}
    # what lies inside a fusion (7 cycles) is part of the fusion's figure
    assert counted == {
        ("fusion.1", 12): 1000,
        ("fusion.1", 3): 1000,
        ("fusion.1", 1): 1000,
        ("copy.1", 1): 50,
    }
    assert program.unknown_loops == ["while.3"]


def test_scopes_and_products():
    program = Program(TEXT)
    fusion, *_, copy = program.costed()
    assert fusion.scope == "jit(step)/student/backbone/blocks/mlp/dot" and copy.scope == ""
    assert program.has_product(fusion) and not program.has_product(copy)


def test_collectives():
    kinds = [c.kind for c in Program(TEXT).collectives()]  # the spread one counts once
    assert sorted(kinds) == ["all-gather", "all-reduce", "dcn", "reduce-scatter", "reduce-scatter"]
    found = {c.kind: c for c in Program(TEXT).collectives()}
    gathered = found["all-gather"]
    assert (gathered.num_bytes, gathered.group_size) == (128 * 384 * 4, 4)
    reduced = found["all-reduce"]
    assert (reduced.num_bytes, reduced.group_size) == (8 * 128 * 2 + 16 * 4, 4)
    assert (reduced.times, reduced.dtype) == (12, "bf16")
    assert found["reduce-scatter"].num_bytes == 2 * 4 * 128 * 4  # of its operand
    fused = next(c for c in Program(TEXT).collectives() if c.num_bytes == 64 * 4)
    assert (fused.kind, fused.group_size) == ("reduce-scatter", 4)
    assert found["dcn"].num_bytes == 8 * 128 * 2


@pytest.mark.parametrize(
    ("line", "num_bytes"),
    [
        ("(f32[2,3], f32[8,3]) all-gather-start(%p)", 8 * 3 * 4),
        ("((f32[2], f32[6]), (f32[8], f32[24])) all-gather-start(%p, %p)", (8 + 24) * 4),
        ("(f32[8,3], f32[2,3]) reduce-scatter-start(%p)", 8 * 3 * 4),
        ("f32[8,3] all-reduce-start(%p)", 8 * 3 * 4),
        ("(f32[8,3], f32[8,3]) collective-permute-start(%p)", 8 * 3 * 4),
    ],
)
def test_asynchronous_collectives(line, num_bytes):
    entry = f"ENTRY %main (p: f32[2]) -> f32[2] {{\n  %x = {line}, replica_groups=[2,4]<=[8]\n}}\n"
    (collective,) = Program(entry).collectives()
    assert collective.num_bytes == num_bytes


def test_collectives_of_the_sparse_cores():
    """TPU7x gathers by a computation that another kind of core runs, called within the loop."""
    program = Program(
        """\
%called_computation.29 (p.1: bf16[1,192,384], p.2: token[]) -> bf16[1,1536,384] {
  %wait = token[] fusion(%p.2), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %all-gather.1 = bf16[1,1536,384]{2,1,0:T(16,128)(2,1)} all-gather(%p.1), channel_id=161, \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={1}
}

%body.1 (arg: (s32[])) -> (s32[]) {
  %start = ((bf16[1,192,384]{2,1,0}, token[]), bf16[1,1536,384]{2,1,0}) call-start(%x, %ready), \
async_execution_thread="sparsecore", to_apply=%called_computation.29
  ROOT %done = bf16[1,1536,384]{2,1,0} call-done(%start)
}

ENTRY %main (p: s32[]) -> s32[] {
  ROOT %while.1 = (s32[]) while(%p), body=%body.1, backend_config={"known_trip_count":{"n":"24"}}
}
"""
    )
    (gathered,) = program.collectives()
    assert (gathered.kind, gathered.num_bytes) == ("all-gather", 1536 * 384 * 2)
    assert (gathered.group_size, gathered.times) == (8, 24)
    assert program.costed() == []


def test_kernels_are_not_the_compilers_marks():
    assert [i.name for i in Program(TEXT).kernels()] == ["kernel.1"]


def test_bytes_of_types():
    text = "(f32[], /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[5], s4[4], f8e4m3fn[3])"
    assert array_bytes(text) == [4, 12, 5, 2, 3]


def test_a_program_of_xla():
    """Trip counts of nested scans and a collective, from the text of this jax's XLA."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def step(x):
        def inner(x, _):
            return jnp.tanh(x @ x.T @ x), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=5)[0], None

        return jax.lax.scan(outer, x, None, length=7)[0].sum()

    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
    program = Program(jax.jit(step).lower(x).compile().as_text())
    assert not program.unknown_loops
    assert {i.times for i in program.instructions} == {1, 7, 35}
    assert {i.times for i in program.instructions if i.opcode == "dot"} == {35}
    sums = [c for c in program.collectives() if c.kind == "all-reduce" and c.num_bytes == 4]
    assert [(c.group_size, c.times) for c in sums] == [(8, 1)]


def test_not_a_program():
    with pytest.raises(ValueError, match="ENTRY"):
        Program("module {}")
