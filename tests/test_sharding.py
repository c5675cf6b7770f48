"""The mesh, the path+shape rule, and one device against eight."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dinov2_jax import sharding
from dinov2_jax.cost.topology import open_topology
from dinov2_jax.losses.head_modes import BlockHeads
from dinov2_jax.objective import LossSettings
from dinov2_jax.train_state import init_state
from tests import tiny


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (dict(), (8, 1, 1)),
        (dict(data=2, fsdp=-1), (2, 4, 1)),
        (dict(data=-1, fsdp=2, model=2), (2, 2, 2)),
    ],
)
def test_mesh_fills_up(axes, shape):
    mesh = sharding.make_mesh(**axes)
    assert mesh.devices.shape == shape
    assert sharding.batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize("axes", [dict(data=3), dict(data=-1, fsdp=-1), dict(data=0)])
def test_mesh_says_what_does_not_fit(axes):
    with pytest.raises(ValueError, match="mesh"):
        sharding.make_mesh(**axes)


def test_a_single_process_has_the_whole_batch():
    assert sharding.host_shares(sharding.make_mesh(data=-1, model=2)) == {0: 4}


BIG = 2**20


@pytest.mark.parametrize(
    ("path", "shape", "mesh_shape", "spec"),
    [
        # the largest axis that divides, never the scanned one
        (
            "student/backbone/blocks/mlp/fc1/kernel",
            (24, 1024, 4096),
            (1, 8, 1),
            P(None, None, "fsdp"),
        ),
        (
            "opt_state/mu/backbone/blocks/mlp/fc2/kernel",
            (24, 4096, 1024),
            (1, 8, 1),
            P(None, "fsdp"),
        ),
        # SwiGLU's halves in one: never the columns, which are split
        ("teacher/backbone/blocks/mlp/w12/kernel", (40, 1536, 8192), (1, 8, 1), P(None, "fsdp")),
        ("teacher/backbone/blocks/attn/qkv/kernel", (24, 1026, 3075), (1, 8, 1), P()),
        ("student/backbone/blocks/norm1/scale", (24, 1024), (1, 8, 1), P()),  # too small
        ("student/dino_head/last_layer/weight_v", (131072, 384), (1, 4, 2), P(("model", "fsdp"))),
        ("student/dino_head/last_layer/weight_v", (131072, 384), (8, 1, 1), P()),
        ("student/dino_head/last_layer/weight_g", (131072, 1), (1, 4, 2), P("model")),
        ("centers/dino", (131072,), (1, 4, 2), P("model")),
        ("student/dino_head/mlp/0/kernel", (1024, 2048), (1, 8, 1), P(None, "fsdp")),
        ("step", (), (1, 8, 1), P()),
    ],
)
def test_rule(path, shape, mesh_shape, spec):
    mesh_shape = dict(zip(sharding.MESH_AXES, mesh_shape, strict=True))
    found = sharding.leaf_spec(path.split("/"), shape, mesh_shape=mesh_shape, min_size_to_shard=BIG)
    assert found == spec


def run(mesh, *, groups: int = 8, **settings) -> tuple[list[dict[str, float]], str]:
    """Three steps with drop path on, everything cut that can be: metrics, and the program."""
    network = tiny.make_network(drop_path_rate=0.5)
    optimizer = tiny.make_optimizer_for(network)
    init = functools.partial(
        init_state, network=network, optimizer=optimizer, image_shape=tiny.IMAGE_SHAPE
    )
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(init, jax.random.key(0))
        states = sharding.tree_sharding(abstract, mesh, min_size_to_shard_mb=0.0)
        state = jax.jit(init, out_shardings=states)(jax.random.key(0))
        step = jax.jit(
            tiny.make_step(network, optimizer, **settings),
            in_shardings=(states, sharding.batch_sharding(mesh), None),
            out_shardings=(states, None),
            donate_argnums=0,
        )
        batches = [
            jax.device_put(tiny.make_batch(seed=seed, groups=groups), sharding.batch_sharding(mesh))
            for seed in range(3)
        ]
        step = step.lower(state, batches[0], tiny.HYPER).compile()
        metrics = []
        for batch in batches:
            state, values = step(state, batch, tiny.HYPER)
            metrics.append({name: float(value) for name, value in values.items()})
    return metrics, step.as_text()


Gpu = dataclasses.make_dataclass(
    "Gpu", ["id", "platform", "device_kind", "process_index", "slice_index"], frozen=True
)


@pytest.mark.parametrize(
    ("axes", "first_row_hosts"),
    [(dict(data=2, fsdp=8), [0] * 8), (dict(data=1, fsdp=16), [0] * 8 + [1] * 8)],
    ids=str,
)
def test_axes_go_over_the_hosts_of_gpus(axes, first_row_hosts):
    """What jax calls a slice of GPUs is one host; stand-ins for two of them with eight each."""
    gpus = [
        Gpu(id=i, platform="gpu", device_kind="H100", process_index=i // 8, slice_index=i // 8)
        for i in range(16)
    ]
    mesh = sharding.make_mesh(**axes, devices=gpus)
    assert [device.slice_index for device in mesh.devices[0, :, 0]] == first_row_hosts


@pytest.fixture(scope="module")
def one_device():
    return run(sharding.make_mesh(devices=jax.devices()[:1]))[0]


@pytest.mark.parametrize(
    "axes", [dict(data=8), dict(data=2, fsdp=4), dict(data=2, fsdp=2, model=2)], ids=str
)
def test_one_device_equals_eight(one_device, axes):
    eight, program = run(sharding.make_mesh(**axes))
    assert "all-to-all" not in program  # no activation moves to be cut another way
    assert_same_metrics(one_device, eight)


def test_blocks_on_eight_devices_equal_dense_on_one(one_device):
    losses = LossSettings(heads=BlockHeads(block_size=2))
    eight, program = run(sharding.make_mesh(data=2, fsdp=2, model=2), losses=losses)
    assert "all-to-all" not in program
    assert_same_metrics(one_device, eight)


def test_blocks_in_micro_batches_on_eight_devices_equal_dense_on_one():
    # 8 groups over 4 shards of the batch and 2 micro-batches; prototypes over model, and fsdp.
    one, _ = run(sharding.make_mesh(devices=jax.devices()[:1]), num_micro_batches=2)
    losses = LossSettings(heads=BlockHeads(block_size=2))
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    eight, program = run(mesh, losses=losses, num_micro_batches=2)
    assert "all-to-all" not in program
    assert_same_metrics(one, eight)


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        (dict(data=4, fsdp=2), dict(losses=LossSettings(centering="softmax_center"))),
        (dict(data=8), dict(num_micro_batches=2, groups=16)),
    ],
    ids=["softmax_centering", "accumulation"],
)
def test_one_device_equals_eight_in_other_compositions(axes, settings):
    one = run(sharding.make_mesh(devices=jax.devices()[:1]), **settings)[0]
    assert_same_metrics(one, run(sharding.make_mesh(**axes), **settings)[0])


def assert_same_metrics(one_device, eight):
    for step, (one, other) in enumerate(zip(one_device, eight, strict=True)):
        assert one.keys() == other.keys()
        for name in one:
            # Adam divides by the gradient's size: where that is rounding noise, steps differ.
            np.testing.assert_allclose(
                other[name], one[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} at step {step}"
            )


def test_bytes_per_device_counts_shards():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    tree = {"a": jax.ShapeDtypeStruct((64, 16), np.float32)}
    shardings = sharding.tree_sharding(tree, mesh, min_size_to_shard_mb=0.0)
    assert sharding.bytes_per_device(tree, shardings) == 64 * 16 * 4 // 8


@pytest.mark.usefixtures("libtpu")
def test_slices_are_cut_by_data_alone():
    topology = open_topology("v5e:2x2", num_slices=2)
    mesh = sharding.make_mesh(data=-1, fsdp=2, devices=topology.devices)
    assert mesh.devices.shape == (4, 2, 1)
    slices = [[device.slice_index for device in row] for row in mesh.devices[:, :, 0]]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("name", "num_slices", "axes"),
    [
        ("v6e:4x4", 1, dict(fsdp=8)),
        ("v5p:2x2x2", 1, dict(fsdp=2, model=2)),
        ("v6e:4x4", 2, dict(fsdp=8)),
    ],
)
def test_axes_need_not_be_sides_of_the_torus(name, num_slices, axes):
    """jax.make_mesh refuses the first (v5e apart): 8 is neither 4 nor 4 x 4."""
    topology = open_topology(name, num_slices=num_slices)
    mesh = sharding.make_mesh(**axes, devices=topology.devices)
    assert mesh.shape["fsdp"] == axes["fsdp"] and mesh.size == len(topology.devices)
    assert len(set(mesh.devices.flat)) == mesh.size


@pytest.mark.usefixtures("libtpu")
def test_whole_sides_come_first():
    """Only a side is a ring: an axis of 4 on 4 x 4 is a row or a column, not a 2 x 2 square."""
    mesh = sharding.make_mesh(fsdp=4, devices=open_topology("v6e:4x4").devices)
    for row in mesh.devices[:, :, 0]:
        xs, ys, _ = zip(*(device.coords for device in row), strict=True)
        assert len(set(xs)) == 1 or len(set(ys)) == 1
