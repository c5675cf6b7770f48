"""The grid of C against scikit-learn, and against the conditions that a minimum meets."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dinov2_jax.evals import logistic
from dinov2_jax.evals.logistic import C_GRID, fit_grid

GRID = [1e-4, 1e-2, 1.0, 1e3]


def make_set(num_classes: int, *, n: int = 90, d: int = 7, seed: int = 0):
    """Overlapping classes, axes of very different length, and a mean far from zero."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    centers = rng.standard_normal((num_classes, d))
    features = (centers[labels] + 1.5 * rng.standard_normal((n, d))) * np.logspace(1, -1, d)
    return (features + 5).astype(np.float32), labels


def oracle_of(features, targets, c: float) -> LogisticRegression:
    """Newton's method with the whole Hessian: exact in ten steps, where L-BFGS takes thousands."""
    oracle = LogisticRegression(C=c, tol=1e-10, solver="newton-cholesky")
    return oracle.fit(features.astype(np.float64), targets)


def objective(features, targets, classifier, c: float) -> float:
    logits = features.astype(np.float64) @ classifier.kernel + classifier.bias
    if targets.ndim == 2:
        entropies = (np.logaddexp(0, logits) - logits * (targets == 1)) * (targets >= 0)
    else:
        entropies = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(logits)), targets]
    return c * entropies.sum() + (classifier.kernel**2).sum() / 2


@pytest.mark.parametrize("num_classes", [2, 4])
def test_coefficients_are_scikit_learns(num_classes):
    features, labels = make_set(num_classes)
    for fitted in fit_grid(features, labels, GRID, num_classes=num_classes):
        oracle = oracle_of(features, labels, fitted.c)
        ours, largest = fitted.classifier, np.abs(oracle.coef_).max()
        np.testing.assert_allclose(ours.kernel.T, oracle.coef_, rtol=0, atol=5e-6 * largest)
        if num_classes > 2:  # of a softmax, biases are free up to a constant
            theirs = oracle.intercept_ - oracle.intercept_.mean()
            np.testing.assert_allclose(ours.bias - ours.bias.mean(), theirs, rtol=1e-3, atol=1e-3)
        else:
            np.testing.assert_allclose(ours.bias, oracle.intercept_, rtol=1e-3)
        np.testing.assert_array_equal(
            ours.scores(features).argmax(axis=1), oracle.predict(features)
        )
        assert fitted.gradient <= logistic.TOLERANCE


def test_it_is_never_worse_than_scikit_learn_where_that_has_stopped():
    features, labels = make_set(3)
    (fitted,) = fit_grid(features, labels, [1e5], num_classes=3)
    oracle = LogisticRegression(C=1e5, max_iter=20_000).fit(features, labels)
    theirs = fitted.classifier._replace(kernel=oracle.coef_.T, bias=oracle.intercept_)
    ours = objective(features, labels, fitted.classifier, 1e5)
    assert ours <= objective(features, labels, theirs, 1e5) * (1 + 1e-9)


def test_several_classes_are_one_regression_each():
    features, labels = make_set(3)
    rng = np.random.default_rng(2)
    targets = (labels[:, None] == np.arange(3)) | (rng.random((90, 3)) < 0.2)
    targets = np.where(rng.random((90, 3)) < 0.1, -1, targets).astype(np.int8)
    (fitted,) = fit_grid(features, targets, [0.1], num_classes=3)
    for i in range(3):
        counts = targets[:, i] >= 0
        oracle = oracle_of(features[counts], targets[counts, i], 0.1)
        np.testing.assert_allclose(
            fitted.classifier.kernel[:, i], oracle.coef_[0], rtol=1e-4, atol=1e-5
        )


def test_fewer_images_than_columns():
    features, labels = make_set(3, n=12, d=30)
    (fitted,) = fit_grid(features, labels, [0.1], num_classes=3)
    oracle = oracle_of(features, labels, 0.1)
    np.testing.assert_allclose(fitted.classifier.kernel.T, oracle.coef_, atol=1e-5)


def test_groups_and_float32_change_little(monkeypatch):
    features, labels = make_set(3)
    whole = list(fit_grid(features, labels, GRID[:3], num_classes=3))
    monkeypatch.setattr(logistic, "_num_at_once", lambda *_: 2)
    parts = list(fit_grid(features, labels, GRID[:3], num_classes=3))
    single = list(fit_grid(features, labels, GRID[:3], num_classes=3, dtype="float32"))
    assert [x.c for x in parts] == GRID[:3]
    for a, b, c in zip(whole, parts, single, strict=True):
        scale = np.abs(a.classifier.kernel).max()
        np.testing.assert_allclose(b.classifier.kernel, a.classifier.kernel, atol=1e-6 * scale)
        np.testing.assert_allclose(c.classifier.kernel, a.classifier.kernel, atol=1e-3 * scale)


def test_iterations_a_few_at_a_time_are_those_at_once(monkeypatch):
    features, labels = make_set(3)
    whole = list(fit_grid(features, labels, GRID, num_classes=3))
    monkeypatch.setattr(logistic, "_ITERATIONS_AT_ONCE", 3)
    monkeypatch.setattr(logistic, "_num_at_once", lambda *_: 2)
    said = []
    parts = list(fit_grid(features, labels, GRID, num_classes=3, on_progress=said.append))
    for a, b in zip(whole, parts, strict=True):
        scale = np.abs(a.classifier.kernel).max()
        np.testing.assert_allclose(b.classifier.kernel, a.classifier.kernel, atol=1e-7 * scale)
        assert b.gradient <= logistic.TOLERANCE
    assert said[0].startswith("C 0.0001 to 0.01: iteration 3 of at most 1000; with all others at")
    assert any(text.startswith("C 1 to 1e+03: iteration 6") for text in said)
    said.clear()
    (cut,) = fit_grid(
        features, labels, [1e3], num_classes=3, max_iterations=8, on_progress=said.append
    )
    assert cut.iterations == 8 and cut.gradient > logistic.TOLERANCE
    assert [text.split(": ")[1].split(";")[0] for text in said] == [
        f"iteration {i} of at most 8" for i in (3, 6, 8)
    ]
    assert said[-1].endswith("at most 0s")


def test_the_grid_is_the_protocols():
    assert len(C_GRID) == 45 and C_GRID[0] == pytest.approx(1e-6)
    ratios = np.diff(np.log10(C_GRID))
    np.testing.assert_allclose(ratios, 11 / 44)


def test_memory_bounds_what_is_fitted_at_once():
    assert logistic._num_at_once(9_000, 384, 20, 45) == 9
    assert logistic._num_at_once(9_000, 384, 20, 10) == 5  # two groups of one size
    # SUN397 with ViT-g: 0.3 GiB each.
    assert logistic._num_at_once(19_850, 1536, 397, 45) < 9
    assert logistic._num_at_once(10**7, 1536, 10_000, 45) == 1


def test_errors():
    features, labels = make_set(3)
    features[4, 2] = np.nan
    with pytest.raises(ValueError, match="features must be finite, and row 4 is not"):
        next(fit_grid(features, labels, num_classes=3))
    with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
        next(fit_grid(features[:2], labels[:2], num_classes=1))
