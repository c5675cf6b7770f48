"""Schedules: exactly the reference's numbers, at every index."""

import math

import numpy as np
import pytest

from dinov2_jax.optim.schedules import (
    Hyperparameters,
    Schedules,
    describe_learning_rate,
    scaled_learning_rate,
    warmup_cosine,
)
from tests.parity import require
from tests.reference import golden_values

# The two recipes of the reference, in steps (configs/train/vitl16_short.yaml and vitl14.yaml).
RECIPES = {
    "vitl16_short": Schedules(
        total_steps=125_000,
        warmup_steps=12_500,
        learning_rate=scaled_learning_rate(4e-3, global_batch_size=2048, rule="sqrt_1024"),
        min_learning_rate=1e-6,
        freeze_last_layer_steps=1250,
        weight_decay_start=0.04,
        weight_decay_end=0.4,
        teacher_momentum_start=0.992,
        teacher_momentum_end=1.0,
        teacher_temp_start=0.04,
        teacher_temp=0.07,
        teacher_temp_warmup_steps=37_500,
    ),
    "vitl14": Schedules(
        total_steps=625_000,
        warmup_steps=100_000,
        learning_rate=scaled_learning_rate(2e-4, global_batch_size=3072, rule="sqrt_1024"),
        min_learning_rate=1e-6,
        freeze_last_layer_steps=1250,
        weight_decay_start=0.04,
        weight_decay_end=0.2,
        teacher_momentum_start=0.994,
        teacher_momentum_end=1.0,
        teacher_temp_start=0.04,
        teacher_temp=0.07,
        teacher_temp_warmup_steps=37_500,
    ),
}

# Short, with every warm-up and freeze length at an edge: none, one step, all steps, beyond.
SHORT = {
    "usual": dict(total=30, warmup=7, freeze=3, temp_warmup=11),
    "none": dict(total=30, warmup=0, freeze=0, temp_warmup=0),
    "one": dict(total=30, warmup=1, freeze=1, temp_warmup=1),
    "two": dict(total=30, warmup=2, freeze=2, temp_warmup=2),
    # 11 * (3.3e-3 / 11) is not 3.3e-3: the end of the warm-up must not be computed.
    "rounding": dict(total=30, warmup=12, freeze=3, temp_warmup=11),
    "all": dict(total=30, warmup=30, freeze=30, temp_warmup=30),
    "freeze beyond the end": dict(total=5, warmup=2, freeze=9, temp_warmup=50),
}


def short_schedules(total: int, warmup: int, freeze: int, temp_warmup: int) -> Schedules:
    return Schedules(
        total_steps=total,
        warmup_steps=warmup,
        learning_rate=3.3e-3,
        min_learning_rate=1e-6,
        freeze_last_layer_steps=freeze,
        weight_decay_start=0.04,
        weight_decay_end=0.4,
        teacher_momentum_start=0.992,
        teacher_momentum_end=1.0,
        teacher_temp_start=0.04,
        teacher_temp=0.07,
        teacher_temp_warmup_steps=temp_warmup,
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", Hyperparameters._fields)
def test_golden(recipe, name):
    """The indices of protocols F(e) and their neighbours, past the end too."""
    golden = golden_values.table("schedules.json")[recipe][name]
    assert {"0", "1249", "1250", "37499", "99999", "100000", "624999"} <= set(golden)
    for step, expected in golden.items():
        values = RECIPES[recipe].at(int(step), dtype=np.float64)
        assert getattr(values, name) == expected, step


@pytest.mark.parity
# An empty warm-up or cosine divides 0 by 0 inside the reference.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("lengths", SHORT.values(), ids=SHORT)
def test_every_index_is_the_reference(lengths):
    """Built as `build_schedulers` builds them, dinov2/train/train.py lines 66-111."""
    CosineScheduler = require("dinov2.utils.utils").CosineScheduler
    schedules = short_schedules(**lengths)
    total = lengths["total"]
    lr = dict(
        base_value=schedules.learning_rate,
        final_value=schedules.min_learning_rate,
        total_iters=total,
        warmup_iters=lengths["warmup"],
        start_warmup_value=0,
    )
    last_layer = CosineScheduler(**lr)
    last_layer.schedule[: lengths["freeze"]] = 0
    reference = Hyperparameters(
        learning_rate=CosineScheduler(**lr),
        last_layer_learning_rate=last_layer,
        weight_decay=CosineScheduler(0.04, 0.4, total),
        teacher_momentum=CosineScheduler(0.992, 1.0, total),
        teacher_temp=CosineScheduler(
            0.07, 0.07, lengths["temp_warmup"], lengths["temp_warmup"], start_warmup_value=0.04
        ),
    )
    for step in range(2 * total + 60):
        got = schedules.at(step, dtype=np.float64)
        for name in Hyperparameters._fields:
            assert getattr(got, name) == getattr(reference, name)[step], (name, step)


def test_the_formula():
    """By hand: warm-up to the peak at W - 1, the peak again at W, half way at the middle."""
    args = dict(start=1.0, peak=3.0, end=0.5, warmup_steps=5, total_steps=15)
    values = [warmup_cosine(step, **args) for step in range(20)]
    assert values[:5] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert values[5] == 3.0
    assert values[10] == pytest.approx((3.0 + 0.5) / 2)
    assert values[14] == pytest.approx(0.5 + 2.5 / 2 * (1 + math.cos(math.pi * 9 / 10)))
    assert values[15:] == [0.5] * 5


def test_freezing_overrides_and_does_not_delay():
    args = dict(start=0.0, peak=1.0, end=0.0, warmup_steps=5, total_steps=15)
    free = [warmup_cosine(step, **args) for step in range(18)]
    frozen = [warmup_cosine(step, **args, freeze_steps=3) for step in range(18)]
    assert frozen == [0.0] * 3 + free[3:]


def test_values_are_rounded_once():
    schedules = RECIPES["vitl14"]
    for got, exact in zip(
        schedules.at(12_345), schedules.at(12_345, dtype=np.float64), strict=True
    ):
        assert got.dtype == np.float32 and got == np.float32(exact)


def test_impossible_schedules_say_so():
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        RECIPES["vitl14"].at(-1)
    with pytest.raises(ValueError, match="warmup_steps=31 must be between 0 and total_steps=30"):
        short_schedules(total=30, warmup=31, freeze=0, temp_warmup=0).at(0)


def test_learning_rate_rules():
    scaled = scaled_learning_rate(2e-4, global_batch_size=3072, rule="sqrt_1024")
    assert scaled == 2e-4 * math.sqrt(3)
    assert scaled_learning_rate(2e-4, global_batch_size=3072, rule="none") == 2e-4
    with pytest.raises(ValueError, match=r"rule='linear' must be one of .*sqrt_1024.*none"):
        scaled_learning_rate(2e-4, global_batch_size=3072, rule="linear")


def test_learning_rate_sentence():
    args = dict(global_batch_size=3072)
    text = describe_learning_rate(2e-4, rule="sqrt_1024", **args)
    assert text == "0.0003464 = 0.0002 * sqrt(3072 images / 1024)"
    text = describe_learning_rate(1e-3, rule="none", **args)
    assert text == "0.001 as configured, whatever the batch size"
