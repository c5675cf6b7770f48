"""Weighted k-nearest-neighbour classification of frozen features. Numpy, after the search.

Behaviour follows dinov2/eval/knn.py (Apache-2.0): the weights are a softmax over all retrieved
neighbours, of which the first k then vote. Here the number retrieved is an argument of its own.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dinov2_jax.neighbors import nearest_neighbors

_QUERIES_AT_ONCE = 4_096  # bounds the table of votes [queries, classes]


def knn_accuracy(
    *,
    bank_features: np.ndarray,
    bank_labels: np.ndarray,
    query_features: np.ndarray,
    query_labels: np.ndarray,
    num_neighbors: Sequence[int],
    temperature: float = 0.07,
    search: Callable[..., tuple[np.ndarray, np.ndarray]] = nearest_neighbors,
) -> dict[int, float]:
    """Share of queries whose class wins the vote, for every k of `num_neighbors`.

    Args:
      bank_features: `[b, d]`, any scale (similarity is cosine).
      bank_labels: integers `[b]`, from 0.
      query_features: `[q, d]`.
      query_labels: integers `[q]`.
      num_neighbors: the numbers of voters k; the largest of them is retrieved.
      temperature: of the softmax over similarities.
      search: `nearest_neighbors`, or what takes queries, bank and k and gives the same.

    Returns:
      Accuracy in [0, 1] by k.

    Raises:
      ValueError: see `nearest_neighbors`; or labels and features differ in number.
    """
    for name, features, labels in (
        ("bank", bank_features, bank_labels),
        ("query", query_features, query_labels),
    ):
        if len(features) != len(labels) or not len(labels):
            raise ValueError(
                f"{len(features)} {name} features and {len(labels)} {name} labels must be "
                "equally many, and at least one"
            )
    similarities, rows = search(query_features, bank_features, k=max(num_neighbors))
    neighbor_labels = np.asarray(bank_labels)[rows]
    num_classes = int(max(np.max(bank_labels), np.max(query_labels))) + 1
    hits = dict.fromkeys(num_neighbors, 0)
    for start in range(0, len(similarities), _QUERIES_AT_ONCE):
        piece = slice(start, start + _QUERIES_AT_ONCE)
        votes = weighted_votes(
            similarities[piece],
            neighbor_labels[piece],
            num_classes=num_classes,
            num_neighbors=num_neighbors,
            temperature=temperature,
        )
        for k, table in votes.items():
            hits[k] += int((table.argmax(axis=1) == np.asarray(query_labels)[piece]).sum())
    return {k: count / len(similarities) for k, count in hits.items()}


def weighted_votes(
    similarities: np.ndarray,
    neighbor_labels: np.ndarray,
    *,
    num_classes: int,
    num_neighbors: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, np.ndarray]:
    """The votes of the first k neighbours, for every k of `num_neighbors`.

        weights = softmax(similarities / temperature)  # over all retrieved neighbours
        votes[k][i, neighbor_labels[i, j]] += weights[i, j]  for j < k

    Args:
      similarities: `[q, r]`, best first.
      neighbor_labels: integers `[q, r]` in [0, num_classes).
      num_classes: width of the tables.
      num_neighbors: each at most r.
      temperature: of the softmax.

    Returns:
      float64 `[q, num_classes]` by k; rows sum to 1 at k = r and to less below it.

    Raises:
      ValueError: more voters are asked for than neighbours were retrieved.
    """
    num_queries, retrieved = similarities.shape
    if max(num_neighbors) > retrieved or min(num_neighbors) < 1:
        raise ValueError(
            f"{num_neighbors=} must lie between 1 and the {retrieved} neighbours retrieved; "
            "lower num_neighbors or enlarge the bank"
        )
    scores = np.asarray(similarities, np.float64) / temperature
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    cells = np.arange(num_queries)[:, None] * num_classes + neighbor_labels
    return {
        k: np.bincount(
            cells[:, :k].ravel(), weights[:, :k].ravel(), minlength=num_queries * num_classes
        ).reshape(num_queries, num_classes)
        for k in num_neighbors
    }
