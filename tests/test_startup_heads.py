"""How a run chooses its way through the prototypes, and how it says so."""

import types

import numpy as np
import pytest

from dinov2_jax import startup_heads
from dinov2_jax.config import REPOSITORY, load_config
from dinov2_jax.losses.head_modes import BlockHeads, DenseHeads
from dinov2_jax.sharding import make_mesh

CONFIG = str(REPOSITORY / "configs" / "vits14.py")


def build(*overrides: tuple[str, str], **mesh: int):
    config = load_config(CONFIG, (("data.path", "photos:"), *overrides))
    mesh = make_mesh(**{"data": 1, "fsdp": 1, "model": 8} | mesh)
    return startup_heads.build_heads(config, mesh), startup_heads.logit_bytes(config, mesh)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), BlockHeads()),  # a large batch on few devices
        ((("global_batch_size", "8"), ("group_size", "8")), DenseHeads()),
        ((("heads", "dense"),), DenseHeads()),
        ((("heads", "blocks"), ("head_block_size", "512")), BlockHeads(512)),
    ],
)
def test_the_choice_follows_batch_and_configuration(overrides, expected):
    assert build(*overrides)[0] == expected


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("tpu", BlockHeads(has_kernels=True)), ("gpu", DenseHeads())],
)
def test_the_choice_is_that_of_the_mesh_and_not_of_this_machine(platform, expected):
    """The compile check, on a CPU, must compile what a TPU will run."""
    devices = np.array([types.SimpleNamespace(platform=platform)])
    mesh = types.SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": 1, "model": 1})
    config = load_config(
        CONFIG, [("global_batch_size", "8"), ("group_size", "8")], needs_data=False
    )
    assert startup_heads.build_heads(config, mesh) == expected


def test_logits_are_shared_by_devices_and_belong_to_losses():
    whole = build()[1]
    assert build(model=1, data=8)[1] == whole  # 1/8 of the rows instead of 1/8 of the prototypes
    assert build(("ibot.loss_weight", "0.0"))[1] + build(("dino.loss_weight", "0.0"))[1] == whole
    assert build(("grad_accumulation_steps", "2"))[1] < whole


def test_blocks_keep_no_logits():
    config = load_config(CONFIG, (("data.path", "photos:"), ("heads", "blocks")))
    text, num_bytes = startup_heads.describe_heads(config, make_mesh())
    assert "in blocks" in text and num_bytes == 0
    dense = load_config(CONFIG, (("data.path", "photos:"), ("heads", "dense")))
    text, num_bytes = startup_heads.describe_heads(dense, make_mesh())
    assert "dense" in text and num_bytes == startup_heads.logit_bytes(dense, make_mesh())
