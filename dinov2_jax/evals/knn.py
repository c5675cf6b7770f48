"""Weighted k-nearest-neighbour classification of frozen features. Numpy, after the search.

Behaviour follows dinov2/eval/knn.py (Apache-2.0): the weights are a softmax over all retrieved
neighbours, of which the first k then vote. Here the number retrieved is an argument of its own.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dinov2_jax.evals.scores import top_classes, top_k_accuracy
from dinov2_jax.neighbors import nearest_neighbors

_VOTES_AT_ONCE = 1 << 22  # cells of the tables of votes [queries, classes], 8 bytes each


def knn_accuracy(
    *,
    bank_features: np.ndarray,
    bank_labels: np.ndarray,
    query_features: np.ndarray,
    query_labels: np.ndarray,
    num_neighbors: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, float]:
    """Share of queries whose class wins the vote, for every k of `num_neighbors`.

    Args:
      query_labels: integers `[q]`.
      others: as `knn_ranking`.

    Returns:
      Accuracy in [0, 1] by k.

    Raises:
      ValueError: see `knn_ranking`.
    """
    _check_labels("query", query_features, query_labels)
    ranked = knn_ranking(
        bank_features=bank_features,
        bank_labels=bank_labels,
        query_features=query_features,
        num_neighbors=num_neighbors,
        temperature=temperature,
        num_ranks=1,
    )
    return {k: top_k_accuracy(classes, query_labels, 1) for k, classes in ranked.items()}


def knn_ranking(
    *,
    bank_features: np.ndarray,
    bank_labels: np.ndarray,
    query_features: np.ndarray,
    num_neighbors: Sequence[int],
    temperature: float = 0.07,
    num_ranks: int = 5,
    search: Callable[..., tuple[np.ndarray, np.ndarray]] = nearest_neighbors,
) -> dict[int, np.ndarray]:
    """The classes with the most votes, for every k of `num_neighbors`.

    Args:
      bank_features: `[b, d]`, any scale (similarity is cosine).
      bank_labels: integers `[b]`, from 0.
      query_features: `[q, d]`.
      num_neighbors: the numbers of voters k; the largest of them is retrieved.
      temperature: of the softmax over similarities.
      num_ranks: classes kept of each query.
      search: `nearest_neighbors`, or what takes queries, bank and k and gives the same.

    Returns:
      int32 `[q, num_ranks]` by k, best first; of equals, and without any vote, the lowest number
      first. Fewer classes give fewer ranks.

    Raises:
      ValueError: see `nearest_neighbors`; or labels and features differ in number.
    """
    _check_labels("bank", bank_features, bank_labels)
    similarities, rows = search(query_features, bank_features, k=max(num_neighbors))
    neighbor_labels = np.asarray(bank_labels)[rows]
    num_classes = int(np.max(bank_labels)) + 1
    at_once = max(_VOTES_AT_ONCE // (num_classes * len(num_neighbors)), 1)
    ranked = {k: [] for k in num_neighbors}
    for start in range(0, len(similarities), at_once):
        piece = slice(start, start + at_once)
        votes = weighted_votes(
            similarities[piece],
            neighbor_labels[piece],
            num_classes=num_classes,
            num_neighbors=num_neighbors,
            temperature=temperature,
        )
        for k, table in votes.items():
            ranked[k].append(top_classes(table, num_ranks))
    return {k: np.concatenate(pieces) for k, pieces in ranked.items()}


def few_shot_rows(labels: np.ndarray, *, shots: int, seed: int | Sequence[int]) -> np.ndarray:
    """Rows of a few images of every class, drawn without replacement.

    The reference draws by PyTorch's generator, which other libraries do not have: the law is the
    same and the images are others.

    Args:
      labels: integers `[rows]`.
      shots: of each class; a smaller class gives all that it has.
      seed: of this draw.
    """
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([rng.permutation(rows)[:shots] for rows in classes])


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
      temperature: of the softmax, above 0.

    Returns:
      float64 `[q, num_classes]` by k; rows sum to 1 at k = r and to less below it.

    Raises:
      ValueError: more voters are asked for than neighbours were retrieved; or the temperature is
        none.
    """
    if not temperature > 0:
        raise ValueError(f"{temperature=} must be above 0; the paper's is 0.07")
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


def _check_labels(name: str, features: np.ndarray, labels: np.ndarray) -> None:
    if len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"{len(features)} {name} features and {len(labels)} {name} labels must be "
            "equally many, and at least one"
        )
