"""The rules of a configuration: each names the value, what it must be, and a cure."""

import pytest

from dinov2_jax.config import REPOSITORY, ConfigError, load_config
from dinov2_jax.config_rules import check_groups

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.py")


def _load(*overrides: str):
    return load_config(QUICKSTART, [tuple(text.split("=", 1)) for text in overrides])


def _error(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.path="], "data.path=/your/images"),
        (["data.mixture=(('a', 1),)"], "both are set"),
        (["data.path=", "data.mixture=('a', 1)"], "each part must be"),
        (["group_size=24"], "nearest that do: 16 and 32"),
        (["crops.global_crop_size_px=60"], "use 56 or 64"),
        (["crops.local_crop_size_px=30"], "use 24 or 32"),
        (["eval.crop_size_px=65"], "eval.crop_size_px=65 must be a multiple"),
        (["total_steps=500", "optim.warmup_steps=501"], "must be at most total_steps=500"),
        (
            ["total_steps=500", "centering.teacher_temp_warmup_steps=501"],
            "must be at most total_steps=500",
        ),
        (["centering.kind=center"], "must be one of: sinkhorn_knopp, softmax_center"),
        (["compiler_preset=fast"], "'fast' must be one of: auto, '', cpu_products, tpu_overlap"),
        (["model.depth=0"], "model.depth=0 must be set"),
        (["model.num_heads=3"], "multiple of model.num_heads=3"),
        (["masks.mask_probability=1.5"], "must lie in 0..1"),
        (["masks.mask_ratio_min=0.6"], "at most masks.mask_ratio_max=0.5"),
        (["data.in_channels=1"], "one number per channel"),
        (["augment.blur_kernel_size_px=8"], "must be odd"),
        (["augment.blur_probability=(0.5,)"], "probabilities of"),
        (["dino.loss_weight=0", "ibot.loss_weight=0"], "must not both be 0"),
        (["grad_accumulation_steps=3"], "must divide the 1 groups"),
        (["mesh.fsdp=0"], "device counts"),
        (["profile_steps=10-13"], "like 10:13"),
        (
            ["profile_steps=50:60", "total_steps=50"],
            "'50:60' must be first:last with first < last, like 10:13, and begin before the end",
        ),
        (["total_steps=0"], "at least 1"),
        (["crops.global_crop_scale=(0.5, 0.2)"], "low <= high"),
        (["eval.bank_path="], "eval.bank_path must be set"),
    ],
)
def test_rules_name_the_value_and_the_cure(overrides, complaint):
    message = _error(*overrides)
    assert complaint in message
    assert any(text.split("=")[0].split(".")[-1] in message for text in overrides)


def test_sizes_that_are_not_used_are_not_checked():
    _load("crops.num_local_crops=0", "crops.local_crop_size_px=30")
    _load("eval.kind=none", "eval.crop_size_px=65")


def test_groups_must_fill_the_batch_shards():
    check_groups(global_batch_size=64, group_size=8, num_batch_shards=8)
    with pytest.raises(ConfigError, match=r"fit: group_size=8, or global_batch_size=128$"):
        check_groups(global_batch_size=64, group_size=16, num_batch_shards=8)
    with pytest.raises(ConfigError) as caught:
        check_groups(global_batch_size=96, group_size=24, num_batch_shards=8)
    assert "group_size=12, or global_batch_size=192" in str(caught.value)
    for size in (12,):
        check_groups(global_batch_size=96, group_size=size, num_batch_shards=8)
    check_groups(global_batch_size=192, group_size=24, num_batch_shards=8)


def test_groups_must_fill_every_micro_batch_of_every_shard():
    check_groups(global_batch_size=64, group_size=2, num_batch_shards=8, num_micro_batches=4)
    with pytest.raises(ConfigError, match=r"grad_accumulation_steps=4; .* group_size=2,"):
        check_groups(global_batch_size=64, group_size=8, num_batch_shards=8, num_micro_batches=4)
