"""What a classifier scores, by the exact definition of each metric. Numpy; shares lie in [0, 1].

Sources: protocol C of the paper's code (dinov2/eval/metrics.py, Apache-2.0); ReaL: Beyer et al.,
2020; 11-point AP: Everingham et al., 2010, section 4.2; mCE: Hendrycks and Dietterich, 2019.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

# Mean error of AlexNet over the five severities, of the 15 corruptions that mCE is defined on.
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


_RANKED_AT_ONCE = 1 << 22  # cells [rows, classes], 12 bytes each


def top_classes(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best classes of each row `[rows, k]`, best first; of equals the first comes first.

    Args:
      scores: `[rows, classes]`.
      k: at most; of fewer classes all are ranked.
    """
    ranked = np.empty((len(scores), min(k, scores.shape[1])), np.int32)
    at_once = max(_RANKED_AT_ONCE // scores.shape[1], 1)
    for start in range(0, len(scores), at_once):
        piece = slice(start, start + at_once)
        ranked[piece] = np.argsort(-scores[piece], axis=1, kind="stable")[:, :k]
    return ranked


def top_k_accuracy(ranked: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the first k of `ranked [rows, ranks]`."""
    return float((ranked[:, :k] == np.asarray(labels)[:, None]).any(axis=1).mean())


def confusion_counts(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 `[classes, classes]`: rows are labels, columns predictions."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predicted, np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(
    predicted: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Share right `[classes]` (NaN for a class without images), and images `[classes]`."""
    counts = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[predicted == labels], minlength=num_classes)
    return np.where(counts > 0, hits / np.maximum(counts, 1), np.nan), counts


def mean_per_class(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """Mean over the classes that have images of the share of their images that is right."""
    return float(np.nanmean(per_class_accuracy(predicted, labels, num_classes)[0]))


def label_set_accuracy(
    predicted: np.ndarray, label_sets: Sequence[Collection[int]]
) -> tuple[float, int]:
    """ReaL: share of images whose prediction is among their labels, and how many images count.

    Args:
      predicted: classes `[rows]`.
      label_sets: right classes of each row; a row without any does not count.

    Raises:
      ValueError: no row has a label.
    """
    hits = [
        int(p) in labels for p, labels in zip(predicted, label_sets, strict=True) if len(labels)
    ]
    if not hits:
        raise ValueError("label sets must hold a class for one image at least; all are empty")
    return float(np.mean(hits)), len(hits)


def average_precision_11_point(scores: np.ndarray, targets: np.ndarray) -> float:
    """Average precision of one class as VOC 2007 defines it; NaN without a positive.

        mean over t = 0, 0.1, .., 1 of the largest precision at a recall of t or more

    Args:
      scores: `[rows]`.
      targets: `[rows]`: 1 positive, 0 negative, -1 left out.
    """
    counts = targets >= 0
    order = np.argsort(-scores[counts], kind="stable")
    hits = targets[counts][order] == 1
    if not hits.any():
        return float("nan")
    found = np.cumsum(hits)
    precision, recall = found / np.arange(1, len(hits) + 1), found / found[-1]
    # Recall is a ratio of whole numbers: 7 of 10 must reach 0.7, whatever 7 / 10 rounds to.
    points = [precision[recall >= t / 10 - 1e-9].max() for t in range(11)]
    return float(np.mean(points))


def mean_average_precision_11_point(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean of `average_precision_11_point` over the classes `[rows, classes]` with a positive."""
    return float(
        np.nanmean(
            [average_precision_11_point(s, t) for s, t in zip(scores.T, targets.T, strict=True)]
        )
    )


def corruption_errors(
    errors: Mapping[str, Sequence[float]], alexnet: Mapping[str, float]
) -> dict[str, float]:
    """Corruption error of each corruption: mean error over severities, over AlexNet's.

    mCE is the mean of them over the 15 of `ALEXNET_ERROR`; 1 is AlexNet.

    Args:
      errors: share wrong at each severity.
      alexnet: its mean error over the same severities.
    """
    return {name: float(np.mean(errors[name]) / alexnet[name]) for name in errors}
