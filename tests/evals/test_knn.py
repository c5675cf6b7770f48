"""The weighted vote against loops and scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from dinov2_jax.evals import knn
from dinov2_jax.evals.knn import knn_accuracy, weighted_votes

TEMPERATURE = 0.07


def features(seed: int, labels: np.ndarray) -> np.ndarray:
    """Overlapping classes: kNN is neither hopeless nor perfect."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).standard_normal((5, 6))
    return (centers[labels] + 1.6 * rng.standard_normal((len(labels), 6))).astype(np.float32)


@pytest.fixture(scope="module")
def sets() -> dict[str, np.ndarray]:
    bank_labels, query_labels = np.arange(80) % 5, np.arange(60) % 5
    return dict(
        bank_features=features(1, bank_labels),
        bank_labels=bank_labels,
        query_features=features(2, query_labels),
        query_labels=query_labels,
    )


def test_votes_are_the_references_loop():
    rng = np.random.default_rng(0)
    similarities = np.sort(rng.uniform(-1, 1, (4, 9)))[:, ::-1]
    labels = rng.integers(0, 3, (4, 9))
    ours = weighted_votes(similarities, labels, num_classes=3, num_neighbors=[2, 5, 9])
    for k, votes in ours.items():
        expected = np.zeros((4, 3))
        for i in range(4):
            weights = np.exp(similarities[i] / TEMPERATURE)
            weights = weights / weights.sum()  # over all 9 retrieved, then the first k vote
            for j in range(k):
                expected[i, labels[i, j]] += weights[j]
        np.testing.assert_allclose(votes, expected, rtol=1e-12)
    np.testing.assert_allclose(ours[9].sum(axis=1), 1)
    assert (ours[2].sum(axis=1) < 1).all()


@pytest.mark.parametrize("k", [1, 10, 80])
def test_accuracy_is_scikit_learns(sets, k):
    def weights(distances):
        return np.exp((1 - distances) / TEMPERATURE)

    oracle = KNeighborsClassifier(k, metric="cosine", weights=weights, algorithm="brute")
    oracle.fit(sets["bank_features"], sets["bank_labels"])
    expected = oracle.score(sets["query_features"], sets["query_labels"])
    assert 0.3 < expected < 0.95
    assert knn_accuracy(**sets, num_neighbors=[k]) == {k: pytest.approx(expected, abs=1e-12)}


def test_several_k_at_once_are_each_k_alone(sets):
    together = knn_accuracy(**sets, num_neighbors=[1, 7, 33])
    assert together == {k: knn_accuracy(**sets, num_neighbors=[k])[k] for k in (1, 7, 33)}


def test_temperature_weighs_the_votes(sets):
    """One near neighbour against two farther ones: cold, the first wins; hot, the two."""
    bank = np.array([[1, 0.1], [1, 0.5], [1, -0.5]])
    query = dict(query_features=np.array([[1.0, 0.0]]), query_labels=np.array([0]))
    bank = dict(bank_features=bank, bank_labels=np.array([0, 1, 1]))
    assert knn_accuracy(**bank, **query, num_neighbors=[3], temperature=0.07) == {3: 1.0}
    assert knn_accuracy(**bank, **query, num_neighbors=[3], temperature=1.0) == {3: 0.0}


def test_pieces_of_queries_change_nothing(sets, monkeypatch):
    whole = knn_accuracy(**sets, num_neighbors=[10])
    monkeypatch.setattr(knn, "_VOTES_AT_ONCE", 7 * 5)
    assert knn_accuracy(**sets, num_neighbors=[10]) == whole


def test_a_class_without_bank_images_cannot_be_right():
    accuracy = knn_accuracy(
        bank_features=np.eye(2),
        bank_labels=np.array([0, 1]),
        query_features=np.eye(2),
        query_labels=np.array([0, 7]),
        num_neighbors=[1],
    )
    assert accuracy == {1: 0.5}


def test_errors_name_value_and_cure(sets):
    with pytest.raises(ValueError, match="k=81 must be between 1 and the bank's 80 rows"):
        knn_accuracy(**sets, num_neighbors=[81])
    with pytest.raises(ValueError, match=r"num_neighbors=\[3\] must lie between 1 and the 2"):
        weighted_votes(np.zeros((1, 2)), np.zeros((1, 2), int), num_classes=1, num_neighbors=[3])
    for temperature in (0, -0.07, float("nan")):
        with pytest.raises(
            ValueError, match=r"temperature=.* must be above 0; the paper's is 0.07"
        ):
            knn_accuracy(**sets, num_neighbors=[1], temperature=temperature)
    with pytest.raises(ValueError, match="80 bank features and 79 bank labels"):
        knn_accuracy(**(sets | {"bank_labels": sets["bank_labels"][1:]}), num_neighbors=[1])
