"""Metrics by hand, by loops, and by scikit-learn."""

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from dinov2_jax.evals import scores
from dinov2_jax.evals.scores import (
    ALEXNET_ERROR,
    average_precision_11_point,
    confusion_counts,
    corruption_errors,
    label_set_accuracy,
    mean_average_precision_11_point,
    mean_per_class,
    per_class_accuracy,
    top_classes,
    top_k_accuracy,
)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 90)
    return rng.standard_normal((90, 7)) + 1.2 * np.eye(7)[labels], labels


def test_top_k_is_scikit_learns(case):
    table, labels = case
    ranked = top_classes(table, 5)
    assert ranked.shape == (90, 5) and ranked.dtype == np.int32
    for k in (1, 2, 5):
        expected = top_k_accuracy_score(labels, table, k=k)
        assert top_k_accuracy(ranked, labels, k) == pytest.approx(expected, abs=1e-12)


def test_ranking_needs_little_more_than_its_result(case, monkeypatch):
    table, _ = case
    whole = top_classes(table, 3)
    monkeypatch.setattr(scores, "_RANKED_AT_ONCE", 7 * 20)
    np.testing.assert_array_equal(top_classes(table, 3), whole)
    table = np.zeros((1000, 100), np.float32)
    tracemalloc.start()
    top_classes(table, 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < table.nbytes / 2


def test_equal_scores_go_to_the_first_class():
    np.testing.assert_array_equal(top_classes(np.array([[0, 2, 2, 1]]), 3), [[1, 2, 3]])
    np.testing.assert_array_equal(top_classes(np.zeros((1, 2)), 5), [[0, 1]])


def test_confusion_and_means_are_scikit_learns(case):
    table, labels = case
    predicted = table.argmax(axis=1)
    confusion = confusion_counts(predicted, labels, 7)
    np.testing.assert_array_equal(confusion, confusion_matrix(labels, predicted))
    expected = balanced_accuracy_score(labels, predicted)
    assert mean_per_class(predicted, labels, 7) == pytest.approx(expected)


def test_a_class_without_images_does_not_count():
    predicted, labels = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 0, 0, 1, 1])
    accuracy, counts = per_class_accuracy(predicted, labels, 3)
    np.testing.assert_array_equal(accuracy, [0.75, 1, np.nan])
    np.testing.assert_array_equal(counts, [4, 2, 0])
    assert mean_per_class(predicted, labels, 3) == pytest.approx((0.75 + 1) / 2)


def test_label_sets():
    """One of several right labels is right; an image without any does not count."""
    predicted = np.array([3, 1, 2, 0])
    assert label_set_accuracy(predicted, [{3, 4}, {0}, set(), {0}]) == (pytest.approx(2 / 3), 3)
    with pytest.raises(ValueError, match="all are empty"):
        label_set_accuracy(predicted[:1], [set()])


def test_11_point_precision_by_hand():
    # Ranked: +, -, +, -, -: precision 1 at recall 1/2, 2/3 at recall 1.
    found = average_precision_11_point(np.arange(5, 0, -1.0), np.array([1, 0, 1, 0, 0]))
    assert found == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    # What does not count is as if it were not there.
    found = average_precision_11_point(np.arange(6, 0, -1.0), np.array([-1, 1, 0, 1, 0, 0]))
    assert found == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert np.isnan(average_precision_11_point(np.ones(2), np.zeros(2)))


def test_11_point_precision_is_the_published_loop():
    """VOCdevkit's VOCap: for each of 0, 0.1, .. the largest precision at that recall or more."""
    rng = np.random.default_rng(1)
    table = rng.standard_normal((200, 4))
    targets = (table + rng.standard_normal((200, 4)) > 1).astype(int)
    expected = []
    for s, t in zip(table.T, targets.T, strict=True):
        order = np.argsort(-s)
        true = np.cumsum(t[order])
        recall, precision = true / true[-1], true / np.arange(1, 201)
        total = 0.0
        for tenth in range(11):
            reached = [p for r, p in zip(recall, precision, strict=True) if 10 * r >= tenth]
            total += max(reached, default=0) / 11
        expected.append(total)
    found = mean_average_precision_11_point(table, targets)
    assert found == pytest.approx(np.mean(expected), abs=1e-9)


def test_a_recall_of_seven_tenths_reaches_it():
    targets = np.array([1] * 7 + [0] * 30 + [1] * 3)
    found = average_precision_11_point(-np.arange(40.0), targets)
    assert found == pytest.approx((8 * 1 + 3 * 10 / 40) / 11)


def test_corruption_error_is_relative_to_alexnets():
    assert len(ALEXNET_ERROR) == 15
    by_severity = (0.69528, 0.82542, 0.93554, 0.98138, 0.99452)
    assert ALEXNET_ERROR["gaussian_noise"] == pytest.approx(np.mean(by_severity), abs=1e-9)
    errors = {"fog": [0.2, 0.4], "snow": [0.1, 0.1]}
    found = corruption_errors(errors, {"fog": 0.6, "snow": 0.5})
    assert found == {"fog": pytest.approx((0.2 + 0.4) / (0.6 + 0.6)), "snow": pytest.approx(0.2)}
