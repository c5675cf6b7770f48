"""The best of a trained grid, and its logits."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dinov2_jax.evals.linear_probe import Columns, Variant, is_finite, predict_grid


def choose(
    params: Any,
    pieces: Iterable[np.ndarray],
    labels: np.ndarray,
    *,
    variants: tuple[Variant, ...],
    columns: Columns,
    rates: Sequence[float],
) -> tuple[dict[str, float | None], tuple[int, int]]:
    """The classifier that is right most often; of equals the first. Diverged ones do not count.

    Args:
      params: of a `ProbeState`.
      pieces: features `[rows, width]`, piece by piece.
      labels: of all rows.
      variants, columns, rates: of the state.

    Returns:
      Per cent right of every classifier by name (None: it diverged); variant and rate of the best.

    Raises:
      ValueError: all have diverged.
    """
    sound = is_finite(params, variants)
    if not sound.any():
        raise ValueError("every classifier has diverged; give lower --lrs, or check the features")
    hits, start = np.zeros((len(variants), len(rates)), np.int64), 0
    for features in pieces:
        predicted = predict_grid(params, features, variants=variants, columns=columns)
        hits += (np.asarray(predicted) == labels[start : start + len(features)]).sum(axis=-1)
        start += len(features)
    # As `top_k_accuracy` has it, to the last bit: the best is reported by both.
    accuracy = np.where(sound, 100 * (hits / start), -1)
    best = np.unravel_index(accuracy.argmax(), accuracy.shape)
    grid = {
        f"{variant.name} lr={rate:g}": float(accuracy[i, j]) if sound[i, j] else None
        for i, variant in enumerate(variants)
        for j, rate in enumerate(rates)
    }
    return grid, (int(best[0]), int(best[1]))


def logits_of(
    kernel: np.ndarray, bias: np.ndarray, pieces: Iterable[np.ndarray], *, seen: slice
) -> np.ndarray:
    """Logits `[rows, classes]` of one classifier.

    Args:
      kernel, bias: `[d, c]` and `[c]`.
      pieces: features `[rows, width]`, piece by piece.
      seen: the d columns that it sees.
    """
    return np.concatenate([features[:, seen] @ kernel + bias for features in pieces])
