"""Instance retrieval: average precision with junk, and the Met's classification by neighbours.

Pure functions of rankings, numpy only. Behaviour follows the revisited Oxford and Paris benchmark
(Radenovic et al., 2018, arXiv:1803.11285) and the Met dataset (Ypsilantis et al., 2021,
arXiv:2202.01747), as their published programs compute it.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Positive and junk kinds of images, by level of difficulty.
LEVELS = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
PLAIN_LEVELS = {"": (("positive",), ("junk",))}
PRECISION_AT = (1, 5, 10)
MET_NEIGHBORS = (1, 2, 3, 5, 7, 10, 15, 20, 50)
MET_TEMPERATURES = (0.01, 0.1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 50.0, 100.0, 500.0)
DISTRACTOR = -1  # label of a query that shows none of the classes


def positive_ranks(
    order: np.ndarray, positives: Sequence[int], junk: Sequence[int] = ()
) -> np.ndarray:
    """Ranks, from 0 and ascending, of the positives in a ranking from which junk is taken out.

    Args:
      order: int `[b]`, rows of the database, best first.
      positives, junk: rows; they share none.
    """
    order = np.asarray(order)
    kept = order[~np.isin(order, np.asarray(junk, int))]
    return np.flatnonzero(np.isin(kept, np.asarray(positives, int)))


def average_precision(ranks: np.ndarray, num_positives: int, *, trapezoid: bool) -> float:
    """Area under precision over recall.

        steps:      sum_j (j + 1) / (rank_j + 1) / num_positives
        trapezoids: sum_j (j / rank_j + (j + 1) / (rank_j + 1)) / 2 / num_positives

    where j / rank_j is 1 at rank 0. Trapezoids are those of revisited Oxford and Paris; of a single
    positive, steps give 1 / (rank + 1).

    Args:
      ranks: of `positive_ranks`.
      num_positives: of the query, also those that the ranking lacks.
      trapezoid: which of the two.
    """
    ranks = np.asarray(ranks, np.float64)
    found = np.arange(len(ranks))
    after = (found + 1) / (ranks + 1)
    if not trapezoid:
        return float(after.sum() / num_positives)
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float((before + after).sum() / 2 / num_positives)


class LevelScores(NamedTuple):
    """What one level of difficulty gives."""

    mean_average_precision: float  # in [0, 1], over the queries that have positives
    average_precisions: list[float | None]  # of each query; None: it has no positive
    precisions: dict[int, float]  # mean precision among the first k, for k of `PRECISION_AT`


def score_level(ranks: Sequence[np.ndarray], *, trapezoid: bool) -> LevelScores:
    """Mean average precision, and precision at k, of all queries.

    Precision at k is taken at the last positive where that comes before k, as published.

    Args:
      ranks: of `positive_ranks` in whole rankings, for each query.
      trapezoid: see `average_precision`.

    Raises:
      ValueError: no query has a positive.
    """
    averages, precisions = [], []
    for found in ranks:
        if not len(found):
            averages.append(None)
            continue
        averages.append(average_precision(found, len(found), trapezoid=trapezoid))
        limits = [min(found.max() + 1, k) for k in PRECISION_AT]
        precisions.append([(found < limit).sum() / limit for limit in limits])
    if not precisions:
        raise ValueError("no query has a positive image; there is nothing to average over")
    counted = [value for value in averages if value is not None]
    means = np.mean(precisions, axis=0)
    return LevelScores(
        float(np.mean(counted)), averages, dict(zip(PRECISION_AT, means.tolist(), strict=True))
    )


def classify_by_neighbors(
    similarities: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    num_neighbors: int,
    temperature: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The Met's classifier: each class counts by its most similar neighbour, negative ones as 0.

        confidence = max_c softmax_c(temperature * similarity of c), unseen classes at 0

    Args:
      similarities: `[q, r]`, best first.
      labels: integers `[q, r]`, classes of the neighbours.
      num_classes: in the database.
      num_neighbors: that are looked at, at most r.
      temperature: a factor, as the published program has it: the larger, the sharper.

    Returns:
      Predicted labels `[q]` (of equals the smallest), confidences float64 `[q]`.
    """
    sims = np.maximum(np.asarray(similarities, np.float64)[:, :num_neighbors], 0)
    labels = np.asarray(labels)[:, :num_neighbors]
    is_new = np.ones(labels.shape, bool)  # the first, so the best, of its class
    for j in range(1, labels.shape[1]):
        is_new[:, j] = (labels[:, :j] != labels[:, j : j + 1]).all(axis=1)
    best = sims[:, :1]
    is_best = is_new & (sims == best)
    predicted = np.where(is_best, labels, np.iinfo(labels.dtype).max).min(axis=1)
    seen = np.where(is_new, np.exp(temperature * (sims - best)), 0).sum(axis=1)
    unseen = (num_classes - is_new.sum(axis=1)) * np.exp(-temperature * best[:, 0])
    return predicted, 1 / (seen + unseen)


def global_average_precision(
    predicted: np.ndarray, confidences: np.ndarray, labels: np.ndarray
) -> float:
    """GAP: precision at each right answer, all queries sorted by confidence.

    Args:
      predicted, confidences: of `classify_by_neighbors`.
      labels: integers `[q]`, `DISTRACTOR` where no answer is right.

    Raises:
      ValueError: all queries are distractors.
    """
    labels = np.asarray(labels)
    num_objects = (labels != DISTRACTOR).sum()
    if not num_objects:
        raise ValueError("every query is a distractor; at least one must show a class")
    order = np.argsort(-np.asarray(confidences), kind="stable")
    is_right = (np.asarray(predicted) == labels)[order]
    precision = np.cumsum(is_right) / np.arange(1, len(labels) + 1)
    return float((precision * is_right).sum() / num_objects)


def met_scores(
    predicted: np.ndarray, confidences: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """`gap`, `gap_minus` (without distractors) and `acc` (likewise), in [0, 1]."""
    known = np.asarray(labels) != DISTRACTOR
    gap = global_average_precision(predicted, confidences, labels)
    without = global_average_precision(predicted[known], confidences[known], labels[known])
    return {
        "gap": gap,
        "gap_minus": without,
        "acc": float((predicted[known] == labels[known]).mean()),
    }


def tune_met(
    similarities: np.ndarray,
    neighbor_labels: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
) -> tuple[int, float, float]:
    """The published grid on the validation queries.

    Args:
      similarities, neighbor_labels: `[q, r]`, best first; r of at least the largest of
        `MET_NEIGHBORS`, or the whole database.
      labels: integers `[q]`.
      num_classes: in the database.

    Returns:
      Neighbours, temperature, GAP in [0, 1]: the first of the best.
    """
    best = (0, 0.0, -1.0)
    for k, temperature in itertools.product(MET_NEIGHBORS, MET_TEMPERATURES):
        if k > similarities.shape[1]:
            continue
        gap = global_average_precision(
            *classify_by_neighbors(
                similarities,
                neighbor_labels,
                num_classes=num_classes,
                num_neighbors=k,
                temperature=temperature,
            ),
            labels,
        )
        if gap > best[2]:
            best = (k, temperature, gap)
    return best
