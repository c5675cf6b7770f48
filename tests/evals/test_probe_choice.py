"""Which classifier of a grid is taken."""

import numpy as np
import pytest

from dinov2_jax.evals.linear_probe import Columns, Variant
from dinov2_jax.evals.probe_choice import choose, logits_of

COLUMNS, VARIANTS, RATES = Columns(1, 2, 1), (Variant(1, False), Variant(1, True)), (0.1, 0.2)
FEATURES = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 5]], np.float32)
LABELS = np.array([0, 1, 0])


def make_params():
    """cls1 tells the columns apart: two of three right. With the mean's, all."""
    alone = np.zeros((2, 2, 2), np.float32)
    alone[:, 1] = np.eye(2)
    both = np.zeros((3, 2, 2), np.float32)
    both[:2, 1], both[2, 1, 0] = np.eye(2), 1
    bias = np.zeros((2, 2), np.float32)
    return {
        "cls1": {"kernel": alone, "bias": bias},
        "cls1_mean": {"kernel": both, "bias": bias.copy()},
    }


def choose_among(params):
    pieces = iter([FEATURES[:2], FEATURES[2:]])
    return choose(params, pieces, LABELS, variants=VARIANTS, columns=COLUMNS, rates=RATES)


def test_the_best_is_taken_and_the_grid_told():
    grid, best = choose_among(make_params())
    assert best == (1, 1)
    assert grid == {
        "cls1 lr=0.1": pytest.approx(200 / 3),  # all zero: class 0
        "cls1 lr=0.2": pytest.approx(200 / 3),
        "cls1_mean lr=0.1": pytest.approx(200 / 3),
        "cls1_mean lr=0.2": 100,
    }


def test_one_that_diverged_is_never_the_best():
    params = make_params()
    for tree in params.values():
        tree["bias"][:, 1] = 99  # always class 1: one of three right
    params["cls1_mean"]["bias"][1, 0] = np.nan  # of NaN the first is taken: class 0, two of three
    grid, best = choose_among(params)
    assert best == (0, 0) and grid["cls1_mean lr=0.2"] is None
    assert grid["cls1 lr=0.1"] == pytest.approx(100 / 3)
    for tree in params.values():
        tree["kernel"][0] = np.inf
    with pytest.raises(ValueError, match="every classifier has diverged; give lower --lrs"):
        choose_among(params)


def test_logits_of_one():
    kernel, bias = np.array([[1, 0], [2, 3]]), np.array([0, 0.5])
    found = logits_of(kernel, bias, iter([FEATURES[:1], FEATURES[1:]]), seen=slice(1, 3))
    np.testing.assert_array_equal(found, [[0, 0.5], [1, 0.5], [11, 15.5]])
