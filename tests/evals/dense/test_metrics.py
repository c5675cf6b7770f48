"""Metrics against scikit-learn, torchmetrics and formulas."""

import numpy as np
import pytest
from sklearn.metrics import jaccard_score, mean_absolute_percentage_error, root_mean_squared_error

from dinov2_jax.evals.dense.metrics import (
    confusion,
    depth_errors,
    iou,
    mean_errors,
    segmentation_metrics,
)
from tests.parity import require


def masks(num_classes=5, seed=0):
    """Three images' truth, a quarter of it ignored, and a prediction that is often right."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes, (3, 12, 13)).astype(np.int16)
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.permuted(truth, axis=2))
    truth[rng.random(truth.shape) < 0.25] = -1
    return truth, predicted


def counts_of(truth, predicted, num_classes=5):
    pairs = zip(truth, predicted, strict=True)
    return sum(confusion(said, there, num_classes) for there, said in pairs)


def test_iou_is_scikit_learns_over_all_images():
    truth, predicted = masks()
    where = truth >= 0
    expected = jaccard_score(truth[where], predicted[where], average=None)
    np.testing.assert_allclose(iou(counts_of(truth, predicted)), expected, rtol=1e-12)
    metrics = segmentation_metrics(counts_of(truth, predicted))
    assert metrics["miou"] == pytest.approx(100 * expected.mean())
    assert metrics["aacc"] == pytest.approx(100 * (truth == predicted)[where].mean())
    recalls = [(predicted == c)[truth == c].mean() for c in range(5)]
    assert metrics["macc"] == pytest.approx(100 * np.mean(recalls))


@pytest.mark.parity
def test_iou_is_torchmetrics():
    torch, torchmetrics = require("torch", "torchmetrics")
    truth, predicted = masks()
    oracle = torchmetrics.classification.MulticlassJaccardIndex(5, average=None, ignore_index=-1)
    for there, said in zip(truth, predicted, strict=True):
        oracle.update(torch.tensor(said.astype(np.int64)), torch.tensor(there.astype(np.int64)))
    np.testing.assert_allclose(iou(counts_of(truth, predicted)), oracle.compute(), rtol=1e-6)


def test_a_class_that_is_nowhere_does_not_count_and_one_that_is_only_said_does():
    truth, predicted = np.array([[0, 0, 1, 1]]), np.array([[0, 2, 1, 1]])
    counts = confusion(predicted, truth, 4)
    np.testing.assert_allclose(iou(counts), [1 / 2, 1, 0, np.nan])
    metrics = segmentation_metrics(counts)
    assert metrics == pytest.approx({"miou": 50, "macc": 75, "aacc": 75})


def test_nothing_labelled_is_an_error():
    with pytest.raises(ValueError, match="no pixel of the tested images has a class"):
        segmentation_metrics(np.zeros((3, 3), int))


def test_depth_errors_are_their_formulas():
    rng = np.random.default_rng(0)
    g = rng.uniform(0.5, 9, 200)
    p = g * np.exp(0.3 * rng.standard_normal(200))
    ratio = np.maximum(g / p, p / g)
    log_error = np.log(p) - np.log(g)
    expected = {
        "rmse": root_mean_squared_error(g, p),
        "abs_rel": mean_absolute_percentage_error(g, p),
        "sq_rel": ((g - p) ** 2 / g).mean(),
        "log10": np.abs(np.log10(g) - np.log10(p)).mean(),
        "d1": 100 * (ratio < 1.25).mean(),
        "d2": 100 * (ratio < 1.25**2).mean(),
        "d3": 100 * (ratio < 1.25**3).mean(),
        "silog": 100 * log_error.std(),
    }
    assert depth_errors(p, g) == pytest.approx(expected)
    assert 0 < expected["d1"] < expected["d2"] < expected["d3"] < 100


def test_a_factor_everywhere_is_no_silog():
    g = np.linspace(1, 5, 50)
    errors = depth_errors(1.2 * g, g)
    assert errors["silog"] == pytest.approx(0, abs=1e-5)
    assert errors["abs_rel"] == pytest.approx(0.2)


def test_errors_are_averaged_over_images_not_pixels():
    one, two = depth_errors(np.full(100, 2.0), np.ones(100)), depth_errors(np.ones(1), np.ones(1))
    assert mean_errors([one, two])["rmse"] == pytest.approx(0.5)
