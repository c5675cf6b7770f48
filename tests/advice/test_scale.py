"""The numbers behind the advice: power laws between two runs, and the teacher's memory, exactly."""

import math

import numpy as np
import pytest

from dinov2_jax.advice import scale
from dinov2_jax.optim.schedules import Schedules

LINES = {
    "CLS tokens": scale.PROTOTYPES["CLS tokens"],
    "masked patches": scale.PROTOTYPES["masked patches"],
    "momentum": scale.MOMENTUM_GAP,
    "learning rate": scale.LEARNING_RATE,
    "warm-up": scale.WARMUP_SHARE,
    "temperature": scale.TEACHER_TEMP["sinkhorn_knopp"],
    "LayerScale": scale.LAYER_SCALE,
    "group": scale.GROUP_SIZE,
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_is_a_power_law_between_two_runs_and_constant_beyond(line):
    (small, first), (large, last) = line.small, line.large
    assert line.at(small) == pytest.approx(first) and line.at(large) == pytest.approx(last)
    assert line.at(math.sqrt(small * large)) == pytest.approx(math.sqrt(first * last))
    assert line.at(small / 9) == pytest.approx(first) and line.at(large * 9) == pytest.approx(last)


def test_the_momentum_of_a_short_run_forgets_the_initialisation():
    for total_steps in (1, 2, 5, 20, 100, 299, 301, 5_000):
        start = scale.fitting_momentum(total_steps)
        left = scale.initialisation_left(start, 1.0, total_steps=total_steps)
        assert left <= (0.5 if total_steps < 12 else 0.05)
    assert scale.fitting_momentum(1_600) == 0.965
    assert scale.fitting_momentum(625_000) == 0.994


def test_the_learning_rate_follows_batch_and_width_and_stays_in_its_range():
    run = dict(global_batch_size=256, embed_dim=384, total_steps=50_000)
    peak = scale.fitting_learning_rate(**run)
    assert scale.fitting_learning_rate(**run | {"global_batch_size": 1024}) == pytest.approx(
        2 * peak
    )
    assert scale.fitting_learning_rate(**run | {"embed_dim": 96}) == pytest.approx(2 * peak)
    assert scale.fitting_learning_rate(**run | {"total_steps": 5_000}) > peak
    low, high = scale.LEARNING_RATES
    assert scale.fitting_learning_rate(**run | {"global_batch_size": 10**7}) == high
    assert (
        scale.fitting_learning_rate(global_batch_size=1, embed_dim=1536, total_steps=10**6) == low
    )


@pytest.mark.parametrize(
    ("start", "end", "total_steps"), [(0.994, 1.0, 300), (0.9, 0.999, 40), (0.5, 1.0, 1)]
)
def test_the_weight_of_the_initialisation_is_the_product_of_the_schedule(start, end, total_steps):
    schedules = Schedules(
        total_steps=total_steps,
        warmup_steps=0,
        learning_rate=1e-3,
        min_learning_rate=1e-6,
        freeze_last_layer_steps=0,
        weight_decay_start=0.04,
        weight_decay_end=0.2,
        teacher_momentum_start=start,
        teacher_momentum_end=end,
        teacher_temp_start=0.04,
        teacher_temp=0.07,
        teacher_temp_warmup_steps=0,
    )
    expected = np.prod(
        [schedules.at(step, dtype=np.float64).teacher_momentum for step in range(total_steps)]
    )
    found = scale.initialisation_left(start, end, total_steps=total_steps)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_weight_of_the_initialisation_in_a_long_run():
    found = scale.initialisation_left(1 - 1e-5, 1 - 1e-5, total_steps=250_001)
    assert found == pytest.approx((1 - 1e-5) ** 250_001, rel=1e-9)
    assert scale.initialisation_left(0.994, 1.0, total_steps=625_000) == 0.0
    assert scale.initialisation_left(1.0, 1.0, total_steps=100) == 1.0
    assert scale.initialisation_left(0.0, 1.0, total_steps=100) == 0.0
    # Not a whole number of steps a piece, and a momentum that moves.
    gap, total_steps = 3e-5, 350_003
    momentum = 1 - gap * 0.5 * (1 + np.cos(np.pi * np.arange(total_steps) / total_steps))
    found = scale.initialisation_left(1 - gap, 1.0, total_steps=total_steps)
    assert found == pytest.approx(np.prod(momentum), rel=1e-8)


def test_the_longest_run_costs_no_more_than_100_000_steps(monkeypatch):
    """With a momentum of 1 nothing is forgotten, so that no early end helps."""
    sizes, cos = [], np.cos
    monkeypatch.setattr(np, "cos", lambda x: sizes.append(np.size(x)) or cos(x))
    assert scale.initialisation_left(1.0, 1.0, total_steps=10**7) == 1.0
    # The gap summed over half a cosine is gap * (total_steps + 1) / 2.
    found = scale.initialisation_left(1 - 1e-6, 1.0, total_steps=10**7)
    assert found == pytest.approx(math.exp(-(1e-6 * (10**7 + 1) / 2)), rel=1e-5)
    assert sizes == [100_000, 100_000]
