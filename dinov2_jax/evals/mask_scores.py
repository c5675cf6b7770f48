"""How well masks agree: region (J) and boundary (F) of the DAVIS benchmark. Numpy only.

Behaviour follows the DAVIS 2017 evaluation (Pont-Tuset et al., arXiv:1704.00675; BSD licence):
masks bool `[height, width]`, boundaries that may be 0.8 % of the diagonal apart.
"""

import math
from typing import NamedTuple

import numpy as np

BOUNDARY_SHARE = 0.008  # of the diagonal
RECALL_ABOVE = 0.5


def region_similarity(mask: np.ndarray, truth: np.ndarray, void: np.ndarray) -> float:
    """J: intersection over union outside `void`; two empty masks give 1."""
    mask, truth = mask & ~void, truth & ~void
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray, void: np.ndarray) -> float:
    """F: harmonic mean of the shares of each boundary that lie near the other's.

    Two masks without boundary give 1; where one alone has none, F is 0.
    """
    radius = math.ceil(BOUNDARY_SHARE * math.hypot(*mask.shape))
    edges = [boundary(x & ~void) for x in (mask, truth)]
    sizes = [int(edge.sum()) for edge in edges]
    if not all(sizes):
        return float(sizes[0] == sizes[1])
    precision = (edges[0] & dilated(edges[1], radius)).sum() / sizes[0]
    recall = (edges[1] & dilated(edges[0], radius)).sum() / sizes[1]
    if precision + recall == 0:
        return 0.0
    return float(2 * precision * recall / (precision + recall))


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or both: half a pixel up and left."""
    right, below, both = (np.zeros_like(mask) for _ in range(3))
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    both[:-1, :-1] = mask[1:, 1:]
    found = (mask ^ right) | (mask ^ below) | (mask ^ both)
    found[-1] = mask[-1] ^ right[-1]
    found[:, -1] = mask[:, -1] ^ below[:, -1]
    found[-1, -1] = False
    return found


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """True within `radius` px of a true pixel, rows of the disk one by one."""
    height, width = mask.shape
    found = np.zeros_like(mask)
    for dy in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        reach = math.isqrt(radius**2 - dy**2)
        # A pixel's window holds a true one where the running count rises within it.
        count = np.pad(mask.cumsum(axis=1, dtype=np.int32), ((0, 0), (reach + 1, reach)), "edge")
        count[:, : reach + 1] = 0
        near = count[:, 2 * reach + 1 :] > count[:, :width]
        source = slice(max(-dy, 0), height - max(dy, 0))
        found[max(dy, 0) : height + min(dy, 0)] |= near[source]
    return found


class Statistics(NamedTuple):
    """Of one object's scores over time."""

    mean: float
    recall: float  # share of frames above one half
    decay: float  # mean of the first quarter less that of the last


def statistics(scores: np.ndarray) -> Statistics:
    """Mean, recall and decay of scores `[frames]`, quarters cut as the benchmark cuts them.

    Raises:
      ValueError: there is no frame.
    """
    scores = np.asarray(scores, np.float64)
    if not len(scores):
        raise ValueError("there must be at least one frame between the first and the last to score")
    ends = np.round(np.linspace(1, len(scores), 5) + 1e-10).astype(int) - 1
    first, last = scores[ends[0] : ends[1] + 1], scores[ends[3] : ends[4] + 1]
    return Statistics(
        float(scores.mean()),
        float((scores > RECALL_ABOVE).mean()),
        float(first.mean() - last.mean()),
    )
