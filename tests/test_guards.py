"""Guards: silent on healthy runs, one warning on a collapse, books of non-finite steps."""

import json

import numpy as np
import pytest

from dinov2_jax import guards
from dinov2_jax.guards import WINDOW, StopRun, new_collapse_state, watch_collapse

WARMUP = 50


def _line(ratio=1.0, std=0.5, rank=5.0, ibot=None):
    return {
        "dino_ce_over_log_k": ratio,
        "ibot_ce_over_log_k": ratio if ibot is None else ibot,
        "feature_std": std,
        "feature_rank": rank,
    }


def _watch(lines, *, state=None, first_step=10):
    """Feeds (step, metrics) or metrics every 10 steps; returns the steps of the warnings."""
    state, warned = state or new_collapse_state(), []
    for i, line in enumerate(lines):
        step = first_step + 10 * i
        state, warning = watch_collapse(state, step=step, metrics=line, warmup_steps=WARMUP)
        state = json.loads(json.dumps(state))  # as a checkpoint would keep it
        if warning:
            assert "\n" not in warning
            warned.append((step, warning))
    return state, warned


def test_a_long_plateau_at_ln_k_with_spreading_features_is_healthy():
    # Measured: LayerScale 1e-5, 4,096 prototypes, 16 images a step.
    stds = np.concatenate([np.geomspace(1e-6, 0.7, 10), np.linspace(0.7, 0.9, 30)])
    ranks = np.concatenate([[1.6, 1.4, 1.4, 1.5], np.linspace(1.5, 3.8, 36)])
    lines = [_line(1.0001, std, rank) for std, rank in zip(stds, ranks, strict=True)]
    lines[20:20] = [{"knn": value} for value in (0.2, 0.3, 0.31)]
    assert _watch(lines)[1] == []


def test_falling_features_below_ln_k_are_healthy():
    lines = [_line(0.98, std) for std in np.geomspace(0.9, 1e-3, 40)]
    assert _watch(lines)[1] == []
    # One loss at ln K, the other learning.
    lines = [_line(1.0, std, ibot=0.97) for std in np.geomspace(0.9, 1e-3, 40)]
    assert _watch(lines)[1] == []


@pytest.mark.parametrize(
    ("fallen", "named"),
    [(dict(std=0.01), "feature_std"), (dict(rank=1.0), "feature_rank")],
)
def test_features_that_fell_at_ln_k_are_a_collapse_reported_once(fallen, named):
    healthy = [_line(0.97) for _ in range(20)]
    collapsed = [_line(1.0, **fallen) for _ in range(30)]
    state, warned = _watch(healthy + collapsed)
    assert len(warned) == 1
    step, text = warned[0]
    # It takes a whole window at ln K, and no more.
    assert step == 10 * (20 + WINDOW)
    assert named in text and "likely causes: learning rate" in text
    # A line off ln K is no recovery.
    flicker = [_line(0.98, **fallen), *collapsed]
    state, warned = _watch(flicker, state=state, first_step=550)
    assert warned == []
    # After a recovery a second collapse is news again.
    _, warned = _watch(healthy + collapsed, state=state, first_step=900)
    assert len(warned) == 1


def test_a_knn_that_fell_at_ln_k_is_a_collapse():
    healthy = [_line(1.0) for _ in range(12)]
    lines = [*healthy, {"knn": 0.8}, *healthy, {"knn": 0.7}, *healthy, {"knn": 0.1}, _line(1.0)]
    _, warned = _watch(lines)
    assert len(warned) == 1 and "kNN has fallen from 80.0% to 10.0%" in warned[0][1]


def test_targets_of_a_single_prototype_are_a_collapse_even_in_the_warm_up():
    """Measured: softmax centering whose center stands still, KoLeo and iBOT off."""
    falling = [_line(ratio) for ratio in (0.065, 0.03, 0.0084, 0.003)]
    collapsed = [_line(0.0004, std=0.2, rank=1.2) for _ in range(20)]
    state, warned = _watch([*falling, *collapsed])
    (step, text), *more = warned
    assert step == 10 * (len(falling) + WINDOW - 1) and not more
    assert "cross-entropy sits at 0" in text and "center_momentum" in text
    # After a recovery it is news again.
    healthy = [_line(0.8) for _ in range(12)]
    assert len(_watch(healthy + collapsed, state=state, first_step=600)[1]) == 1
    # Sharp targets are not it, nor one loss of two.
    assert _watch([_line(0.15) for _ in range(40)])[1] == []
    assert _watch([_line(0.0004, ibot=0.5) for _ in range(40)])[1] == []


def test_nothing_is_said_before_the_warm_up_is_over():
    lines = [_line(1.0, std) for std in np.geomspace(0.9, 1e-4, WARMUP // 10 + WINDOW)]
    assert _watch(lines)[1] == []


def test_a_collapse_during_the_warm_up_is_measured_from_the_start_of_the_run():
    lines = [_line(1.0, 0.8)] * WINDOW + [_line(1.0, 1e-3)] * 20
    assert len(_watch(lines)[1]) == 1


def test_one_line_off_ln_k_or_not_finite_starts_no_alarm():
    healthy = [_line(0.97)] * 20
    flicker = [_line(1.0, 0.01) if i % WINDOW else _line(0.99, 0.01) for i in range(30)]
    assert _watch(healthy + flicker)[1] == []
    assert _watch([_line(float("nan"))] * 30)[1] == []
    assert _watch([{"feature_std": 0.1, "feature_rank": 1.0}] * 30)[1] == []


def test_a_resumed_watch_warns_where_the_uninterrupted_one_does():
    lines = [_line(0.97)] * 20 + [_line(1.0, 0.01)] * 20
    expected = _watch(lines)[1]
    for cut in range(0, len(lines), 3):
        state, before = _watch(lines[:cut])
        _, after = _watch(lines[cut:], state=state, first_step=10 + 10 * cut)
        assert before + after == expected


def test_nonfinite_terms_are_named_and_else_the_gradients():
    metrics = {"total_loss": np.nan, "koleo_loss": np.inf, "ibot_loss": 1.0}
    assert guards.nonfinite_terms(metrics) == ["koleo_loss"]
    metrics = {"total_loss": 1.0, "grad_norm/backbone": np.nan, "grad_norm/dino_head": 1.0}
    assert guards.nonfinite_terms(metrics) == ["the gradient of backbone"]
    metrics = {"total_loss": 1.0, "koleo_loss": 1.0, "grad_norm/backbone": 1.0}
    assert guards.nonfinite_terms(metrics) == ["the update"]


def test_nonfinite_batches_are_saved_and_bounded(tmp_path):
    path = guards.nonfinite_file(tmp_path, 7)
    guards.save_nonfinite(path, step=7, terms=["koleo_loss"], index=np.arange(24, 28))
    assert json.loads(path.read_text()) == {
        "step": 7,
        "terms": ["koleo_loss"],
        "index": [24, 25, 26, 27],
    }
    guards.check_nonfinite(3, limit=3, last="step 7")
    with pytest.raises(StopRun, match=r"4 steps were not finite.*max_nonfinite_steps=3.*step 7"):
        guards.check_nonfinite(4, limit=3, last="step 7")
