"""The start-up table and the last words: right numbers, honest comparisons."""

import jax.numpy as jnp
import pytest

from dinov2_jax import report
from dinov2_jax.advice.proposals import Suggestion
from dinov2_jax.checkpoints import abstract_like
from dinov2_jax.sharding import make_mesh, tree_sharding
from dinov2_jax.train_state import TrainState


def test_the_table_counts_parameters_bytes_and_images():
    mesh = make_mesh(data=1, fsdp=4, model=2)
    head = {"w": jnp.zeros((250, 10)), "last_layer": {"weight_v": jnp.zeros((600, 400))}}
    backbone = {"v": jnp.zeros((100, 500)), "w": jnp.zeros((1000, 500)), "x": jnp.zeros((8, 2))}
    params = {"backbone": backbone, "dino_head": head}
    scalar = jnp.zeros((), jnp.int32)
    state = TrainState(scalar, params, params, {"mu": params, "nu": params}, {})
    state = abstract_like(state, tree_sharding(state, mesh, min_size_to_shard_mb=0.1))
    table = report.start_table(
        config_path="configs/a.py",
        workdir="runs/a",
        mesh=mesh,
        state=state,
        dtype="float32",
        chosen="remat none",
        heads="dense",
        global_batch_size=64,
        group_size=4,
        learning_rate="0.1 as configured",
        activation_bytes=3_000_000_000,
        epochs=1.5,
        total_steps=1000,
    )
    assert "data 1 x fsdp 4 x model 2, of 8 x cpu" in table
    assert "chosen by auto    remat none" in table
    assert "backbone 0.55 M, dino_head 0.2425 M" in table
    assert "64 images, 16 x 4 in groups; 16 images a device" in table
    # Four copies; large matrices are cut over fsdp = 4, the prototypes over both, the rest whole.
    assert f"state {report.megabytes(4 * 4 * (550_000 / 4 + 2_516 + 240_000 / 8) + 8)}" in table
    ways = [line.strip() for line in table.splitlines()[-4:]]
    assert ways == [
        "shards            axis 0 over fsdp: 1 array, 2 MB, the largest backbone/w [1000, 500]",
        "axis 0 over model x fsdp: 1 array, 0.96 MB, the largest dino_head/last_layer/weight_v "
        "[600, 400]",
        "axis 1 over fsdp: 1 array, 0.2 MB, the largest backbone/v [100, 500]",
        "whole on each device: 2 arrays, 0.0101 MB, the largest dino_head/w [250, 10]",
    ]
    assert "about 3 GB" in table and "1,000, 1.5 passes" in table


def test_suggestions_are_a_table_and_the_flags_of_the_changes():
    fits = Suggestion("group_size", 64, 64, "it fits")
    changes = [Suggestion("a.k", 256, 4096, "too many"), Suggestion("b", 0.98, 0.994, "too slow")]
    assert report.suggestion_table([changes[0], fits, changes[1]]).splitlines() == [
        "  key         now    suggested  why",
        "  a.k         4096   256        too many",
        "  group_size  64     as it is   it fits",
        "  b           0.994  0.98       too slow",
        "--config.a.k=256 --config.b=0.98",
    ]
    assert report.suggestion_table([fits]).splitlines()[-1] == "nothing to change"


def test_activations_grow_with_what_they_depend_on():
    settings = dict(
        images=8,
        global_tokens=257,
        local_tokens=50,
        num_local_crops=8,
        embed_dim=384,
        depth=12,
        num_heads=6,
        mlp_ratio=4.0,
        itemsize=4,
        kept_share=1.0,
        remat="none",
    )
    whole = report.estimate_activation_bytes(**settings)
    # A step of this size was measured to need 2.7 GB with K = 1,024 on a CPU.
    assert 1.5e9 < whole < 4e9
    for change in (
        {"images": 4},
        {"depth": 6},
        {"itemsize": 2},
        {"kept_share": 0.6},
        {"num_local_crops": 0},
    ):
        assert report.estimate_activation_bytes(**settings | change) < whole, change


def test_activations_with_remat_are_what_is_kept():
    """Ten tokens in two crops, a block of width 8; half of the images are in a branch."""
    settings = dict(
        images=1,
        global_tokens=5,
        local_tokens=1,
        num_local_crops=0,
        embed_dim=8,
        depth=1,
        num_heads=1,
        mlp_ratio=4.0,
        itemsize=1,
        kept_share=0.5,
    )
    for remat, widths in {
        "dots": 1 + (3 + 1 + 1 + 4 + 1) / 2,  # input; qkv, attention, proj, hidden, output
        "branches": 1 + (1 + 1 + 1) / 2,  # input; attention and the outputs of both branches
        "blocks": 1,
    }.items():
        found = report.estimate_activation_bytes(**settings, remat=remat)
        assert found == 10 * 8 * widths, remat


def test_logits_are_of_rows_and_prototypes():
    settings = dict(images=8, num_micro_batches=1, num_local_crops=3, masked_rows=10)
    dino = report.estimate_logit_bytes(**settings, num_prototypes=(100, 0))
    assert dino == 4 * 100 * 8 * (2 + 3 * (2 + 3))
    ibot = report.estimate_logit_bytes(**settings, num_prototypes=(0, 50))
    assert ibot == 4 * 50 * 8 * 2 * (10 + 2 * 10)
    # Micro-batches leave the teacher's part.
    settings["num_micro_batches"] = 4
    both = report.estimate_logit_bytes(**settings, num_prototypes=(100, 50))
    assert both == 4 * 8 * (100 * (2 + 3 * 5 / 4) + 50 * 20 * (1 + 3 / 4))


def test_the_last_words_say_where_the_network_stands():
    metrics = {
        "knn/photos/cls": 0.5,
        "knn/photos/random_init_cls": 0.3,
        "knn/photos/raw_pixels": 0.5,
        "knn/photos/color_stats": 0.6,
        "knn/photos/chance": 0.05,
    }
    standing, where = report.last_words(
        workdir="runs/q", metrics=metrics, name="photos", is_own_data=False
    )
    assert standing == (
        "kNN photos: 50.0%, above its random initialisation (30.0%), not above raw pixels "
        "(50.0%), not above six colour statistics (60.0%), above chance (5.0%)"
    )
    assert "runs/q" in where and "--config.data.path=/your/images" in where
    (where,) = report.last_words(workdir="runs/q", metrics={}, name="x", is_own_data=True)
    assert "/your/images" not in where


@pytest.mark.parametrize(("num_bytes", "text"), [(12_345_678, "12.3 MB"), (3.4e9, "3.4 GB")])
def test_bytes_in_words(num_bytes, text):
    assert report.megabytes(num_bytes) == text
