"""How good dense predictions are: sums of intersections and unions, and errors of depth. Numpy.

Behaviour: mmseg's mean IoU (Apache-2.0), and the depth metrics of Eigen et al., 2014, image by
image, of which the mean over images is taken.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from dinov2_jax.evals.dense.mask_sets import IGNORED

DEPTH_METRICS = ("rmse", "abs_rel", "sq_rel", "log10", "d1", "d2", "d3", "silog")


def confusion(predicted: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels by class and by prediction, int64 `[num_classes, num_classes]`.

    Args:
      predicted: classes `[height, width]`.
      classes: the truth, `IGNORED` where nothing is asked.
      num_classes: of both.
    """
    is_asked = classes != IGNORED
    numbers = classes[is_asked].astype(np.int64) * num_classes + predicted[is_asked]
    return np.bincount(numbers, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class `[classes]`; NaN where it is neither there nor said."""
    right = np.diag(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - right
    return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)


def segmentation_metrics(counts: np.ndarray) -> dict[str, float]:
    """Per cent: `miou` and `macc`, means over classes, and `aacc`, over pixels.

    Args:
      counts: sum of `confusion` over all images.

    Raises:
      ValueError: no pixel is labelled.
    """
    total = counts.sum()
    if not total:
        raise ValueError("no pixel of the tested images has a class; look at --ignore")
    right, there = np.diag(counts), counts.sum(axis=1)
    accuracy = right[there > 0] / there[there > 0]
    return {
        "miou": 100 * float(np.nanmean(iou(counts))),
        "macc": 100 * float(accuracy.mean()),
        "aacc": 100 * float(right.sum() / total),
    }


def depth_errors(predicted: np.ndarray, depth: np.ndarray) -> dict[str, float]:
    """The errors of one image.

    Args:
      predicted, depth: metres above 0, `[pixels]` that are judged.

    Returns:
      `DEPTH_METRICS`: rmse in metres; abs_rel, sq_rel, log10; d1 to d3, the per cent of pixels that
      are within a factor of 1.25, its square and its cube; silog, 100 times the deviation of the
      log error.
    """
    predicted, depth = predicted.astype(np.float64), depth.astype(np.float64)
    error, log_error = depth - predicted, np.log(predicted) - np.log(depth)
    factor = np.maximum(depth / predicted, predicted / depth)
    within = {f"d{n}": 100 * np.mean(factor < 1.25**n) for n in (1, 2, 3)}
    errors = {
        "rmse": np.sqrt(np.mean(error**2)),
        "abs_rel": np.mean(np.abs(error) / depth),
        "sq_rel": np.mean(error**2 / depth),
        "log10": np.mean(np.abs(log_error)) / np.log(10),
        # Of equal errors the difference may be a little below 0.
        "silog": 100 * np.sqrt(max(np.mean(log_error**2) - np.mean(log_error) ** 2, 0)),
    }
    return {name: float((errors | within)[name]) for name in DEPTH_METRICS}


def mean_errors(errors: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each over images."""
    errors = list(errors)
    return {name: float(np.mean([x[name] for x in errors])) for name in DEPTH_METRICS}
