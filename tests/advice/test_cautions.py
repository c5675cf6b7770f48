"""Warnings: silent for what may work, one line with key, rule and cure for what cannot."""

import dataclasses
import re

import pytest

from dinov2_jax.advice.cautions import warnings_of
from tests.advice.runs import PAPER, SMALL

HEALTHY = dataclasses.replace(
    PAPER,
    **SMALL | {"warmup_steps": 300},
    dino_prototypes=512,
    ibot_prototypes=512,
    momentum_start=0.98,
    layer_scale_init=0.1,
    teacher_temp_start=0.02,
    teacher_temp=0.02,
)

FEW_STEPS = {"warmup_steps": 1, "freeze_last_layer_steps": 0, "momentum_start": 0.5}


def warnings(**changes) -> list[str]:
    return warnings_of(dataclasses.replace(HEALTHY, **changes))


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        (
            {"dino_prototypes": 131_072},
            r"^dino.num_prototypes=131072 .* 128 CLS tokens .* 1,024 prototypes or more; .* 256,",
        ),
        (
            {"ibot_prototypes": 131_072},
            r"^ibot.num_prototypes=131072 .* 1,229 masked patches .* 107 prototypes .* about 512,",
        ),
        (
            {"has_separate_head": False, "mask_probability": 0.01, "dino_prototypes": 2048},
            r"^dino.num_prototypes=2048 .* 25 masked patches .* about 256,",
        ),
        (
            {"warmup_steps": 2400},
            r"^optim.warmup_steps=2400 is 80% of total_steps=3000: .*; shorten it to about 300$",
        ),
        (
            {"freeze_last_layer_steps": 3000},
            r"^optim.freeze_last_layer_steps=3000 is 100% of total_steps=3000: .*; shorten it",
        ),
        (
            {"momentum_start": 0.9999},
            r"^teacher.momentum_start=0.9999 .* 86% its initialisation; lower it to about 0.971,",
        ),
        (
            {"num_images": 10},
            r"^global_batch_size=64 of 10 images takes each 6.4 times .*; lower it to 10 ",
        ),
        (
            {"local_crop_size_px": 8},
            r"^crops.local_crop_size_px=8 is 1 patch of model.patch_size=8: .*; use 16 or more",
        ),
        (
            {"base_learning_rate": 0.1},
            r"^optim.base_learning_rate=0.1 .* peak of 0.025 .* 1e-05..0.01; .* about 0.004$",
        ),
        (
            {"base_learning_rate": 0.1, "layerwise_lr_decay": 0.9},
            r"^optim.base_learning_rate=0.1 .* which should lie in 1e-05..0.01; bring it there$",
        ),
        (
            {"teacher_temp": 0.07},
            r"^centering.teacher_temp=0.07 .* total_steps=3000: .* lower it to about 0.024,",
        ),
        (
            {"teacher_temp": 0.02, "centering": "softmax_center"},
            r"^centering.teacher_temp=0.02 is too low .* about 0.043, or set .*=sinkhorn_knopp$",
        ),
        (
            {"teacher_temp_start": 0.2},
            r"^centering.teacher_temp_start=0.2 .* total_steps=3000: .* lower it to about 0.022$",
        ),
        (
            {"base_learning_rate": 0.03},
            r"^optim.base_learning_rate=0.03 .* which is 8 times what fits 3000 .* about 0.004$",
        ),
        (
            {"min_learning_rate": 0.1},
            r"^optim.min_learning_rate=0.1 is above the peak of 5e-05: .*; set it to the peak",
        ),
        (
            {"base_learning_rate": 1e-6, "min_learning_rate": 0.0},
            r"^optim.base_learning_rate=1e-06 .* set it to about 0.004$",
        ),
        (
            {"layer_scale_init": 1e-5},
            r"^model.layer_scale_init=1e-05 .* total_steps=3000: .*; raise it to about 0.1$",
        ),
        (
            {"group_size": 1},
            r"^koleo.loss_weight=0.1 does nothing with group_size=1: .*; raise group_size to 64,",
        ),
        (
            {"group_size": 1, "num_batch_pieces": 64},
            r"^koleo.loss_weight=0.1 .*; set koleo.loss_weight=0$",
        ),
        (
            {"centering": "softmax_center", "teacher_temp": 0.04, "center_momentum": 0.9999},
            r"^centering.center_momentum=0.9999 .* total_steps=3000: .*; 0.9 is usual$",
        ),
        (
            FEW_STEPS | {"centering": "softmax_center", "teacher_temp": 0.04, "total_steps": 9},
            r"^centering.center_momentum=0.9 .* total_steps=9: .*; lower it, or train longer$",
        ),
    ],
)
def test_a_warning_names_key_value_rule_and_cure(changes, pattern):
    (line,) = warnings(**changes)
    assert re.search(pattern, line), line
    assert "\n" not in line


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dino_prototypes": 2048},  # 16 for each row: below the paper's 21
        {"centering": "softmax_center", "teacher_temp": 0.04, "dino_prototypes": 131_072},
        {"dino_weight": 0.0, "dino_prototypes": 131_072},
        {"warmup_steps": 1500},
        {"warmup_steps": 0, "freeze_last_layer_steps": 0},
        {"num_images": 40},  # some images twice, as in the quickstart
        {"local_crop_size_px": 16},
        {"num_local_crops": 0, "local_crop_size_px": 8},
        {"koleo_weight": 0.0, "group_size": 1},
        {"center_momentum": 1.0},  # of softmax centering alone
        {"layer_scale_init": 1e-5, "total_steps": 20_000},
        {"teacher_temp_start": 0.2, "teacher_temp_warmup_steps": 0},  # never reached
        {"base_learning_rate": 0.012},  # 3 times: behind, and learns
        {"base_learning_rate": 4e-3, "min_learning_rate": 1e-3},
        FEW_STEPS | {"centering": "softmax_center", "teacher_temp": 0.04, "total_steps": 10},
        FEW_STEPS | {"total_steps": 1},
        FEW_STEPS | {"total_steps": 3, "warmup_steps": 2, "freeze_last_layer_steps": 2},
        # Proposed, rounded: a peak of 0.01005.
        {"num_images": 12_288, "global_batch_size": 12_288, "base_learning_rate": 0.0029},
    ],
)
def test_what_may_work_is_not_warned_of(changes):
    assert warnings(**changes) == []
    assert warnings_of(PAPER) == []


def test_a_larger_batch_may_have_more_prototypes_than_the_paper():
    run = dataclasses.replace(PAPER, global_batch_size=4096, dino_prototypes=262_144)
    assert warnings_of(run) == []
