"""kNN among images, each left out of its own vote."""

import numpy as np
import pytest

from benchmarks.leave_one_out import NUM_NEIGHBORS, accuracy, others


def test_no_image_is_its_own_neighbour_copies_are():
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    x[1] = x[0]
    x[10:20] = x[10]  # more copies than neighbours are asked for
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarities, rows = others(x, x, k=4)
    assert not (rows == np.arange(40)[:, None]).any()
    expected = x @ x.T
    np.fill_diagonal(expected, -np.inf)
    expected = -np.sort(-expected, axis=1)[:, :4]
    np.testing.assert_allclose(similarities, expected, atol=1e-6)
    assert rows[0, 0] == 1 and rows[1, 0] == 0
    assert set(rows[10:20].flat) <= set(range(10, 20))


def test_accuracy_is_that_of_the_others():
    """Random features: with its own vote, which weighs most, each image would be right."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 64)).astype(np.float32)
    labels = np.arange(400) % 4
    assert accuracy(x, labels) == pytest.approx(25, abs=8)
    x[np.arange(400), labels] += 20
    assert accuracy(x, labels) > 90
    assert NUM_NEIGHBORS == 20
