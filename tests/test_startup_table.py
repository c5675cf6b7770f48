"""The start-up table says what will run: what "auto" became, crop by crop where that differs."""

import re

import jax
import pytest

from dinov2_jax import startup, startup_table
from dinov2_jax.config import REPOSITORY, load_config
from dinov2_jax.cost.topology import open_topology
from dinov2_jax.sharding import make_mesh

KEYS = (
    "attention",
    "layer_norm",
    "product_form",
    "drop_path_form",
    "remat",
    "heads",
    "compiler_preset",
)


def load(*overrides: tuple[str, str], recipe: str = "quickstart"):
    return load_config(str(REPOSITORY / "configs" / f"{recipe}.py"), overrides, needs_data=False)


def table(config) -> str:
    trainer = startup.build_trainer(config, startup.build_mesh(config))
    return startup_table.describe(
        config, trainer, config_path="a.py", workdir="runs/a", num_images=1000
    )


def chosen(config) -> str:
    (line,) = [line for line in table(config).splitlines() if "chosen by auto" in line]
    return line.split(maxsplit=3)[3]


def test_the_table_says_what_auto_became(monkeypatch):
    monkeypatch.setattr(startup_table, "choose_preset", lambda name, platform: f"{platform}'s")
    given = [("attention", "xla"), ("compiler_preset", "auto"), ("model.drop_path_rate", "0.1")]
    words = (
        "layer_norm products, product_form transposed, drop_path_form gather, remat dots, "
        "heads dense, compiler_preset cpu's"
    )
    assert chosen(load(*given)) == words
    # Where it makes no difference, it is not named.
    others = words.replace("drop_path_form gather, ", "")
    assert chosen(load(*given[:2])) == others
    assert chosen(load(*given, ("model.drop_path_mode", "bernoulli"))) == others


def test_the_table_says_nothing_of_what_was_given():
    given = dict(zip(KEYS, ("xla", "xla", "plain", "gather", "none", "blocks", ""), strict=True))
    config = load(*given.items())
    assert "chosen by auto" not in table(config)
    assert "in blocks: " in table(config)


def test_kernels_that_are_kept_count():
    mesh = [("mesh.fsdp", "2"), ("group_size", "16"), ("mesh.min_size_to_shard_mb", "0")]
    gathered, kept = load(*mesh), load(*mesh, ("mesh.backward_kernels", "keep"))
    assert chosen(gathered).endswith("mesh.backward_kernels gather")
    assert "backward_kernels" not in chosen(kept) + chosen(load())
    one_size = load(*mesh, ("mesh.backward_kernels", "keep"), ("crops.num_local_crops", "0"))
    configs = (gathered, one_size, kept)
    trainers = [startup.build_trainer(config, startup.build_mesh(config)) for config in configs]
    d, depth = trainers[0].network.backbone.embed_dim, trainers[0].network.backbone.depth
    # Queries, keys and values, projection, two layers; float32.
    found = list(map(startup_table.kept_kernel_bytes, configs, trainers))
    assert found == [0, 0, depth * (3 + 1 + 4 + 4) * d**2 * 4]
    (before, *_), (after, *_) = (
        re.findall(r"activations about (\d+)", table(c)) for c in (gathered, kept)
    )
    assert int(after) - int(before) == round(found[2] / 1e6)


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("topology", "overrides", "expected"),
    [
        ("v5e:2x2", {"crops.global_crop_size_px": 518}, "pallas"),
        ("v4:2x2x1", {}, "pallas"),
        ("v4:2x2x1", {"crops.global_crop_size_px": 518}, "xla at 1370 tokens, pallas at 50"),
        ("v4:2x2x1", {"crops.global_crop_size_px": 518, "crops.num_local_crops": 0}, "xla"),
    ],
)
def test_attention_that_has_no_room_is_that_of_xla(topology, overrides, expected):
    config = load(*((key, str(value)) for key, value in overrides.items()), recipe="vitl14")
    mesh = make_mesh(devices=open_topology(topology).devices)
    backbone = startup.build_network(config, mesh.devices.flat[0]).backbone
    assert backbone.attention == "pallas"
    assert startup_table.describe_attention(config, backbone, mesh) == expected
    # As the network has it.
    with jax.set_mesh(mesh):
        size = config.crops.global_crop_size_px
        image = jax.ShapeDtypeStruct((4, size, size, 3), "float32")
        program = str(
            jax.make_jaxpr(lambda x: backbone.init_with_output(jax.random.key(0), x)[0])(image)
        )
    assert ("attention_forward" in program) == (expected == "pallas")
