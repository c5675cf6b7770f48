"""From a configuration to what a run computes with, without computing anything."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from dinov2_jax import startup, workload
from dinov2_jax.config import REPOSITORY, ConfigError, load_config


def load(*overrides: str, recipe: str = "quickstart"):
    path = str(REPOSITORY / "configs" / f"{recipe}.py")
    pairs = [tuple(text.split("=", 1)) for text in ("data.path=photos:", *overrides)]
    return load_config(path, pairs)


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("auto", "cpu", jnp.float32),
        ("auto", "tpu", jnp.bfloat16),
        ("auto", "gpu", jnp.bfloat16),
        ("float32", "tpu", jnp.float32),
        ("bfloat16", "cpu", jnp.bfloat16),
    ],
)
def test_the_compute_type_follows_the_platform(dtype, platform, expected):
    assert startup.compute_dtype(load(f"dtype={dtype}"), platform=platform) == expected


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ("vits14", dict(embed_dim=384, depth=12, num_heads=6, ffn="mlp", patch_size=14)),
        ("vitg14", dict(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu", patch_size=14)),
        ("vitl16_short", dict(embed_dim=1024, depth=24, patch_size=16, pos_embed_grid=(14, 14))),
    ],
)
def test_recipes_build_the_networks_they_name(recipe, sizes):
    network = startup.build_network(load(recipe=recipe), jax.devices()[0])
    assert {name: getattr(network.backbone, name) for name in sizes} == sizes
    assert (network.ibot_head is None) == (recipe == "vitl16_short")  # its head is shared


def test_a_size_in_the_configuration_goes_before_the_variants():
    network = startup.build_network(load("model.depth=18", recipe="vitb14"), jax.devices()[0])
    assert (network.backbone.depth, network.backbone.embed_dim) == (18, 768)


@pytest.mark.parametrize(
    ("overrides", "heads"),
    [
        ([], {"dino_head", "ibot_head"}),
        (["ibot.separate_head=false"], {"dino_head"}),
        (["ibot.loss_weight=0.0"], {"dino_head"}),
        (["dino.loss_weight=0.0"], {"ibot_head"}),
        (["dino.loss_weight=0.0", "ibot.separate_head=false"], {"dino_head"}),
    ],
)
def test_only_heads_that_a_loss_needs_are_built(overrides, heads):
    network = startup.build_network(load(*overrides), jax.devices()[0])
    assert set(network.modules) - {"backbone"} == heads


def test_a_mesh_may_use_a_part_of_the_devices():
    mesh = startup.build_mesh(load("mesh.data=2", "mesh.fsdp=2", "group_size=8"))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 1}
    assert mesh.size < len(jax.devices())
    with pytest.raises(ConfigError, match="mesh"):
        startup.build_mesh(load("mesh.data=3", "mesh.fsdp=-1", "group_size=8"))


@pytest.mark.parametrize("used", [1, 2])
def test_every_process_needs_a_device_of_the_mesh(used):
    """The recipe for one device, started on three hosts of two devices each."""
    devices = [types.SimpleNamespace(process_index=i // 2) for i in range(6)]
    with pytest.raises(ConfigError, match=rf"mesh {used}x1x1 leaves processes \[1, 2\] without"):
        startup.build_mesh(load(f"mesh.data={used}"), devices)


@dataclasses.dataclass(frozen=True)
class HostDevice:
    """One of several on a host that is not this one."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def on_hosts(*counts: int) -> list[HostDevice]:
    hosts = [host for host, count in enumerate(counts) for _ in range(count)]
    return [HostDevice(i, host) for i, host in enumerate(hosts)]


@pytest.mark.parametrize(
    ("hosts", "axes", "shares"),
    [
        # The last host has fewer devices in it.
        ((4, 4), ["mesh.data=6"], "mesh 6x1x1 .* of its 6 pieces they hold 4, 2,"),
        # The one in the middle holds two pieces in part.
        ((2, 2, 2), ["mesh.data=-1", "mesh.model=3"], "mesh 2x1x3 .* 2 pieces they hold 1, 2, 1,"),
        ((4, 2), ["mesh.data=-1"], "mesh 6x1x1 .* they hold 4, 2,"),
    ],
)
def test_processes_of_unequal_shares_are_refused(hosts, axes, shares):
    """Each says one word an image, and the words of all are one array."""
    config = load(*axes, "global_batch_size=12", "group_size=2")
    with pytest.raises(ConfigError, match=f"{shares} and each must hold as many; set mesh.data or"):
        startup.build_mesh(config, on_hosts(*hosts))


@pytest.mark.parametrize(
    ("hosts", "axes"),
    [
        ((4, 4), ["mesh.data=-1"]),
        ((2, 2, 2), ["mesh.data=1", "mesh.model=6"]),
        ((2, 2, 2, 2), ["mesh.data=-1", "mesh.model=4"]),
        ((4, 4), ["mesh.data=-1", "mesh.fsdp=2", "mesh.model=2"]),
        ((4, 2), ["mesh.data=1", "mesh.model=-1"]),  # each has the whole batch
    ],
)
def test_equal_shares_of_any_kind_are_fine(hosts, axes):
    config = load(*axes, "global_batch_size=16", "group_size=2")
    mesh = startup.build_mesh(config, on_hosts(*hosts))
    assert mesh.size == sum(hosts)


def test_the_abstract_state_is_the_state():
    """Checkpoints are restored onto it: shapes, types and shardings must be the initial ones."""
    config = load("model.embed_dim=16", "model.depth=1", "model.num_heads=2", "mesh.data=1")
    mesh = startup.build_mesh(config)
    trainer = startup.build_trainer(config, mesh)

    def same(leaf, expected):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)

    with jax.set_mesh(mesh):
        jax.tree.map(same, trainer.init(), trainer.abstract_state)


def test_the_step_reuses_the_memory_of_its_state():
    config = load("model.embed_dim=16", "model.depth=1", "model.num_heads=2", "mesh.data=1")
    mesh = startup.build_mesh(config)
    trainer = startup.build_trainer(config, mesh)
    batch, state = workload.abstract_batch(config, mesh), trainer.abstract_state
    with jax.set_mesh(mesh):
        step = trainer.train_step.lower(state, batch, trainer.schedules.at(0)).compile()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes >= size


def test_what_a_room_refuses_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match="depth"), startup.as_config_error():
        raise ValueError("depth must be 1")
    inner = ConfigError("as it is")
    with pytest.raises(ConfigError) as caught, startup.as_config_error():
        raise inner
    assert caught.value is inner
