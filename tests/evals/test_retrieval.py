"""Retrieval scores against lists done by hand, and the published programs written out in loops."""

import itertools

import numpy as np
import pytest

from dinov2_jax.evals.retrieval import (
    LEVELS,
    MET_NEIGHBORS,
    MET_TEMPERATURES,
    PRECISION_AT,
    average_precision,
    classify_by_neighbors,
    global_average_precision,
    met_scores,
    positive_ranks,
    score_level,
    tune_met,
)


def published_scores(order, ok, junk, kappas):
    """The revisited benchmark's AP and precision at k of one query, step by step."""
    order = list(order)
    positions = [i for i, row in enumerate(order) if row in ok]
    junk_positions = [i for i, row in enumerate(order) if row in junk]
    passed = index = 0
    for i, position in enumerate(positions):
        while index < len(junk_positions) and position > junk_positions[index]:
            passed += 1
            index += 1
        positions[i] = position - passed
    ap = 0.0
    for j, rank in enumerate(positions):
        before = 1.0 if rank == 0 else j / rank
        ap += (before + (j + 1) / (rank + 1)) / len(ok) / 2
    ranks = [position + 1 for position in positions]
    limits = [min(max(ranks), k) for k in kappas]
    return ap, [sum(rank <= limit for rank in ranks) / limit for limit in limits]


@pytest.mark.parametrize(
    "order, positives, junk, ranks, trapezoids, steps",
    [
        ([7, 1, 2], [7], [], [0], 1, 1),
        ([1, 7, 2], [7], [], [1], (0 / 1 + 1 / 2) / 2, 1 / 2),
        ([9, 7, 2], [7], [9], [0], 1, 1),  # junk before it does not count
        ([7, 9, 2], [7], [9], [0], 1, 1),  # nor after it
        ([9, 1, 8, 7, 6, 2], [7, 6], [9, 8], [1, 2], 0.25 / 2 + (1 / 2 + 2 / 3) / 4, 7 / 12),
        ([9, 8], [7], [9, 8], [], 0, 0),  # a ranking that lacks it
    ],
)
def test_by_hand(order, positives, junk, ranks, trapezoids, steps):
    found = positive_ranks(order, positives, junk)
    assert found.tolist() == ranks
    for trapezoid, expected in ((True, trapezoids), (False, steps)):
        ap = average_precision(found, len(positives), trapezoid=trapezoid)
        assert ap == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_as_published(level):
    rng = np.random.default_rng(0)
    orders, truths = [], []
    for _ in range(20):
        orders.append(rng.permutation(40))
        kinds = np.split(rng.permutation(40)[:18], np.sort(rng.integers(0, 18, 2)))
        truths.append(dict(zip(("easy", "hard", "junk"), (x.tolist() for x in kinds), strict=True)))
    truths[3] = {"easy": [], "hard": [], "junk": [1, 2]}  # no positive: left out of the mean
    ok = [[x for kind in LEVELS[level][0] for x in truth[kind]] for truth in truths]
    junk = [[x for kind in LEVELS[level][1] for x in truth[kind]] for truth in truths]
    ranks = [positive_ranks(*case) for case in zip(orders, ok, junk, strict=True)]
    found = score_level(ranks, trapezoid=True)
    expected = [
        published_scores(*case, PRECISION_AT) if case[1] else None
        for case in zip(orders, ok, junk, strict=True)
    ]
    assert [x is None for x in found.average_precisions] == [x is None for x in expected]
    counted = [x for x in expected if x is not None]
    assert found.mean_average_precision == pytest.approx(np.mean([x[0] for x in counted]))
    precisions = np.mean([x[1] for x in counted], axis=0)
    np.testing.assert_allclose(list(found.precisions.values()), precisions)
    with pytest.raises(ValueError, match="no query has a positive"):
        score_level([positive_ranks(orders[0], [], [1])], trapezoid=True)


def test_what_is_junk_at_each_level():
    """By hand; 1 is easy, 2 hard, 3 junk, 0 none of them."""
    kinds, order = {"easy": [1], "hard": [2], "junk": [3]}, np.array([3, 2, 0, 1])
    found = {
        level: score_level(
            [
                positive_ranks(
                    order, *([row for x in names for row in kinds[x]] for names in chosen)
                )
            ],
            trapezoid=True,
        ).mean_average_precision
        for level, chosen in LEVELS.items()
    }
    assert found == {
        "easy": pytest.approx((0 / 1 + 1 / 2) / 2),  # of 0, 1
        "medium": pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2),  # of 2, 0, 1
        "hard": 1,  # of 2, 0
    }


def published_classifier(similarities, labels, num_classes, k, t):
    """The Met's kNN classifier for one query, step by step."""
    best = {}
    for similarity, label in zip(similarities[:k], labels[:k], strict=True):
        best[label] = max(best.get(label, 0.0), similarity)
    names = sorted(best)
    weights = np.exp(t * np.array([best[name] for name in names]))
    weights /= weights.sum() + (num_classes - len(names))
    return names[int(weights.argmax())], weights.max()


def published_gap(predicted, confidences, labels):
    order = sorted(range(len(labels)), key=lambda i: -confidences[i])
    right, total = 0, 0.0
    for place, i in enumerate(order, 1):
        if predicted[i] == labels[i]:
            right += 1
            total += right / place
    return total / sum(label != -1 for label in labels)


@pytest.fixture(scope="module")
def met():
    """Similarities and labels of 12 neighbours of 30 queries, and the queries' labels."""
    rng = np.random.default_rng(1)
    similarities = -np.sort(-rng.uniform(-0.4, 1, (30, 12)), axis=1)
    similarities[4] = -np.arange(1, 13) / 20  # all negative: every class at 0
    return similarities, rng.integers(10, 17, (30, 12)), rng.choice([-1, *range(10, 17)], 30)


@pytest.mark.parametrize("k, t", [(1, 1.0), (5, 0.1), (12, 30.0), (7, 500.0)])
def test_met_classifier_as_published(met, k, t):
    similarities, labels, truth = met
    found = classify_by_neighbors(
        similarities, labels, num_classes=9, num_neighbors=k, temperature=t
    )
    expected = [
        published_classifier(*pair, 9, k, t) for pair in zip(similarities, labels, strict=True)
    ]
    assert found[0].tolist() == [x[0] for x in expected]
    np.testing.assert_allclose(found[1], [x[1] for x in expected], rtol=1e-9)
    known = truth != -1
    assert met_scores(*found, truth) == {
        "gap": pytest.approx(published_gap(*found, truth)),
        "gap_minus": pytest.approx(published_gap(*(x[known] for x in (*found, truth)))),
        "acc": np.mean(found[0][known] == truth[known]),
    }


def test_met_grid_takes_the_first_of_the_best(met):
    similarities, labels, truth = met
    grid = itertools.product([k for k in MET_NEIGHBORS if k <= 12], MET_TEMPERATURES)
    gaps = {}
    for k, t in grid:
        pairs = zip(similarities, labels, strict=True)
        found = [published_classifier(*pair, 9, k, t) for pair in pairs]
        gaps[k, t] = published_gap([x[0] for x in found], [x[1] for x in found], truth)
    best = max(gaps, key=gaps.get)
    found = tune_met(similarities, labels, truth, num_classes=9)
    assert found == (*best, pytest.approx(gaps[best]))


def test_distractors_cost_precision():
    """By hand: right at confidence .9 and .7, a distractor between."""
    predicted, labels = np.array([1, 2, 3]), np.array([1, -1, 3])
    gap = global_average_precision(predicted, np.array([0.9, 0.8, 0.7]), labels)
    assert gap == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="every query is a distractor"):
        global_average_precision(predicted, predicted, np.full(3, -1))
