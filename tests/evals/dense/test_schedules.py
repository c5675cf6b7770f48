"""Schedules at the steps where they turn, as formulas of mmcv's hooks."""

import math

import pytest

from dinov2_jax.evals.dense.schedules import HeadSchedule

POLY = HeadSchedule(
    decay="poly", peak=1e-3, total_steps=40_000, warmup_steps=1_500, warmup_ratio=1e-6
)
COSINE = HeadSchedule(
    decay="cosine",
    peak=1e-4,
    total_steps=38_400,
    warmup_steps=12_800,
    warmup_ratio=1e-3,
    b1_cycle=(0.95, 0.85),
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-3 * 1e-6),
        (750, 1e-3 * (1 - 750 / 40_000) * (1 - (1 - 1e-6) / 2)),
        (1_500, 1e-3 * (1 - 1_500 / 40_000)),
        (20_000, 5e-4),
        (39_999, 1e-3 / 40_000),
    ],
)
def test_poly(step, expected):
    assert POLY.learning_rate(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-4 * 1e-3),
        (6_400, 1e-4 * (1 + math.cos(math.pi / 6)) / 2 * (1 - (1 - 1e-3) / 2)),
        (12_800, 1e-4 * (1 + math.cos(math.pi / 3)) / 2),
        (19_200, 1e-4 / 2),
        (38_399, 1e-4 * 1e-8 + 1e-4 / 2 * (1 - 1e-8) * (1 - math.cos(math.pi / 38_400))),
    ],
)
def test_cosine(step, expected):
    assert COSINE.learning_rate(step) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.95), (11_519, 0.85), ((11_519 + 38_399) / 2, 0.9), (38_399, 0.95)]
)
def test_one_cycle_of_momentum(step, expected):
    assert COSINE.momentum(step) == pytest.approx(expected, rel=1e-12)
    assert POLY.momentum(step) == 0.9


def test_errors():
    with pytest.raises(ValueError, match="decay='linear' must be poly or cosine"):
        HeadSchedule(decay="linear", peak=1, total_steps=2, warmup_steps=0, warmup_ratio=1)
    with pytest.raises(ValueError, match=r"warmup_steps=3 must lie between 0 and total_steps=2"):
        HeadSchedule(decay="poly", peak=1, total_steps=2, warmup_steps=3, warmup_ratio=1)


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_trainings_have_numbers(total):
    schedule = HeadSchedule(
        decay="cosine",
        peak=1.0,
        total_steps=total,
        warmup_steps=0,
        warmup_ratio=1.0,
        b1_cycle=(0.95, 0.85),
    )
    for step in range(total):
        assert 0 < schedule.learning_rate(step) <= 1
        assert 0.85 <= schedule.momentum(step) <= 0.95
