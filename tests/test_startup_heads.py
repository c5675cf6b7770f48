"""Which rows the heads get, how a run chooses its way through the prototypes, and says so."""

import math
import types

import numpy as np
import pytest

from dinov2_jax import startup_heads
from dinov2_jax.config import REPOSITORY, load_config
from dinov2_jax.cost.chips import GPUS, gpu_memory_bytes
from dinov2_jax.cost.topology import open_topology
from dinov2_jax.losses.head_modes import BlockHeads, DenseHeads
from dinov2_jax.sharding import make_mesh
from dinov2_jax.workload import abstract_batch

CONFIG = str(REPOSITORY / "configs" / "vits14.py")


def build(*overrides: tuple[str, str], **mesh: int):
    config = load_config(CONFIG, (("data.path", "photos:"), *overrides))
    mesh = make_mesh(**{"data": 1, "fsdp": 1, "model": 8} | mesh)
    return startup_heads.build_heads(config, mesh), startup_heads.logit_bytes(config, mesh)


def load_batch(size: int):
    """The recipe with a batch of one group."""
    overrides = [("global_batch_size", str(size)), ("group_size", str(size))]
    return load_config(CONFIG, overrides, needs_data=False)


def one_device(platform: str, device_kind: str):
    """A mesh of a device that is not there."""
    device = types.SimpleNamespace(platform=platform, device_kind=device_kind)
    shape = {"data": 1, "fsdp": 1, "model": 1}
    return types.SimpleNamespace(devices=np.array([device]), shape=shape)


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
    assert startup_heads.build_heads(load_batch(8), one_device(platform, "")) == expected


@pytest.mark.parametrize(
    ("device_kinds", "batch_size", "expected"),
    [
        # The board, and its name in a topology: the run and the compile check choose alike.
        (("NVIDIA H100 80GB HBM3", "h100"), 64, DenseHeads()),
        (("NVIDIA H100 80GB HBM3", "h100"), 96, BlockHeads()),
        (("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "a100"), 64, DenseHeads()),
        (("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "a100"), 96, BlockHeads()),
        (("NVIDIA H200", "h200"), 128, DenseHeads()),
        # Other memory than its namesakes', and what is not known: as if it were small.
        (("NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"), 32, BlockHeads()),
    ],
)
def test_a_gpu_with_more_memory_keeps_dense_heads_for_longer(device_kinds, batch_size, expected):
    """ViT-S with 131,072 prototypes: 4.4 GB for 32 images, 8.8, 13.2 and 17.6."""
    for device_kind in device_kinds:
        mesh = one_device("gpu", device_kind)
        assert startup_heads.build_heads(load_batch(batch_size), mesh) == expected, device_kind


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", GPUS)
def test_the_devices_of_a_topology_have_the_memory_of_their_board(name):
    (device,) = open_topology(f"cuda:{name}:1x1").devices
    assert gpu_memory_bytes(device.device_kind) == GPUS[name].memory_bytes


def test_logits_are_shared_by_devices_and_belong_to_losses():
    whole = build()[1]
    assert build(model=1, data=8)[1] == whole  # 1/8 of the rows instead of 1/8 of the prototypes
    assert build(("ibot.loss_weight", "0.0"))[1] + build(("dino.loss_weight", "0.0"))[1] == whole
    assert build(("grad_accumulation_steps", "2"))[1] < whole


def test_without_an_ibot_loss_nothing_is_masked():
    def draw(*overrides: tuple[str, str]):
        config = load_config(CONFIG, overrides, needs_data=False)
        return startup_heads.build_masks(config)(np.random.default_rng(0))

    masks, _, weights = draw()
    assert masks.any() and weights.any()
    masks, _, weights = draw(("ibot.loss_weight", "0.0"))
    assert not masks.any() and not weights.any()


def test_every_shipped_recipe_describes_masks_of_its_grid():
    for path in sorted((REPOSITORY / "configs").glob("vit*.py")):
        config = load_config(str(path), needs_data=False)
        grid = config.crops.global_crop_size_px // config.model.patch_size
        masks = startup_heads.build_masks(config)
        assert (masks.rows, masks.cols) == (grid, grid), path.name


@pytest.mark.parametrize("group_size", [32, 12])
def test_the_rows_that_hold_nothing_count_too(group_size):
    """What is kept is of the arrays' rows: targets, logits and their exponentials."""
    overrides = [("group_size", str(group_size)), ("dino.loss_weight", "0.0")]
    config, mesh = load_config(CONFIG, overrides, needs_data=False), make_mesh(data=8)
    rows = math.prod(abstract_batch(config, mesh)["mask_indices"].shape) // 8
    found = startup_heads.logit_bytes(config, mesh)
    assert found == 3 * 4 * rows * config.ibot.num_prototypes


def test_blocks_keep_no_logits():
    config = load_config(CONFIG, (("data.path", "photos:"), ("heads", "blocks")))
    text, num_bytes = startup_heads.describe_heads(config, make_mesh())
    assert "in blocks" in text and num_bytes == 0
    dense = load_config(CONFIG, (("data.path", "photos:"), ("heads", "dense")))
    text, num_bytes = startup_heads.describe_heads(dense, make_mesh())
    assert "dense" in text and num_bytes == startup_heads.logit_bytes(dense, make_mesh())


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("topology", "overrides", "expected"),
    [
        ("v5e:2x2", (), "by kernels: "),
        ("v4:2x2x1", (), "by kernels, but for the losses, in blocks: "),
        ("v4:2x2x1", (("ibot.loss_weight", "0.0"),), "by kernels: "),
        # More rows than a call takes are several calls, but only so many.
        ("v5p:2x2x1", (("global_batch_size", "1024"),), "by kernels: "),
        ("v5p:2x2x1", (("global_batch_size", "131072"),), "by kernels, but for the losses"),
    ],
)
def test_kernels_without_room_are_not_claimed(topology, overrides, expected):
    config = load_config(CONFIG, overrides, needs_data=False)
    mesh = make_mesh(devices=open_topology(topology).devices)
    assert startup_heads.describe_heads(config, mesh)[0].startswith(expected)
