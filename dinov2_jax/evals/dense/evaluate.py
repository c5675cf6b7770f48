"""Predictions of all tested images against the truth; several processes share them."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dinov2_jax.data.ahead import map_ahead
from dinov2_jax.data.records import DataError
from dinov2_jax.evals.dense.charts import Example
from dinov2_jax.evals.dense.metrics import DEPTH_METRICS, confusion, depth_errors
from dinov2_jax.progress import Display


def evaluate_masks(
    dataset: Any,
    predict: Callable[[np.ndarray], np.ndarray],
    *,
    num_classes: int,
    num_examples: int,
    num_threads: int,
    is_shown: bool,
) -> tuple[np.ndarray, list[Example]]:
    """Counts of `metrics.confusion` over all images, and some examples.

    Args:
      dataset: has a length, `pairs` and `read(i)`.
      predict: image uint8 `[height, width, 3]` -> classes `[height, width]`.
      num_classes: of the set.
      num_examples: of this process, evenly spaced.
      num_threads: that decode.
      is_shown: whether progress is.
    """
    counts, examples = np.zeros((num_classes, num_classes), np.int64), []
    for name, image, classes, is_example in _tested(dataset, num_examples, num_threads, is_shown):
        predicted = predict(image)
        counts += confusion(predicted, classes, num_classes)
        if is_example:
            examples.append(Example(name, image, classes, predicted))
    return _gathered(counts).sum(axis=0), examples


def evaluate_depths(
    dataset: Any,
    predict: Callable[[np.ndarray, tuple[int, int]], np.ndarray],
    *,
    is_judged: Callable[[tuple[int, int]], np.ndarray],
    depth_range: tuple[float, float],
    clip: float | None,
    num_examples: int,
    num_threads: int,
    is_shown: bool,
) -> tuple[dict[str, float], int, list[Example]]:
    """Mean errors over images, how many had depth, and some examples.

    Args:
      dataset: has a length, `pairs` and `read(i)`.
      predict: (image uint8 `[height, width, 3]`, size) -> metres of that size.
      is_judged: size -> which pixels are, bool.
      depth_range: of the truth that is judged, in metres; ends excluded.
      clip: larger depth, true or predicted, counts as this; None: as it is.
      others: see `evaluate_masks`.

    Raises:
      DataError: see `require_depth`.
    """
    require_depth(dataset, is_judged=is_judged, depth_range=depth_range)
    sums, examples = np.zeros(len(DEPTH_METRICS) + 1), []
    for name, image, depth, is_example in _tested(dataset, num_examples, num_threads, is_shown):
        predicted = predict(image, depth.shape)
        if clip is not None:
            depth, predicted = np.minimum(depth, clip), np.minimum(predicted, clip)
        where = _judged_pixels(depth, is_judged, depth_range)
        if where.any():
            errors = depth_errors(predicted[where], depth[where])
            sums += [*(errors[metric] for metric in DEPTH_METRICS), 1]
        if is_example:
            examples.append(Example(name, image, depth, predicted))
    *totals, count = _gathered(sums).sum(axis=0).tolist()
    return dict(zip(DEPTH_METRICS, (x / count for x in totals), strict=True)), int(count), examples


def require_depth(
    dataset: Any,
    *,
    is_judged: Callable[[tuple[int, int]], np.ndarray],
    depth_range: tuple[float, float],
) -> None:
    """Reads images until one has depth that is judged: the first, where all is well.

    Raises:
      DataError: none has.
    """
    maps = (dataset.read(i)[1] for i in range(len(dataset)))
    if not any(_judged_pixels(depth, is_judged, depth_range).any() for depth in maps):
        low, high = depth_range
        raise DataError(
            f"none of {len(dataset)} images has depth between {low:g} and {high:g} m where it is "
            "judged; look at --scale, the units of the files in a metre, and at --range"
        )


def _judged_pixels(depth: np.ndarray, is_judged: Callable, depth_range) -> np.ndarray:
    low, high = depth_range
    return (depth > low) & (depth < high) & is_judged(depth.shape)


def _tested(dataset, num_examples: int, num_threads: int, is_shown: bool) -> Iterator[tuple]:
    """(name, image, target, whether it is an example) of this process's images."""
    mine = range(jax.process_index(), len(dataset), jax.process_count())
    chosen = np.linspace(0, len(mine) - 1, min(num_examples, len(mine))).round()
    examples = {mine[int(i)] for i in chosen}
    read = map_ahead(dataset.read, mine, num_threads=num_threads, ahead=2 * num_threads)
    with Display(total=len(mine), done=0, unit="image", is_shown=is_shown) as display:
        for done, (number, (image, target)) in enumerate(zip(mine, read, strict=True), 1):
            yield dataset.pairs[number].name, image, target, number in examples
            display.show(done, "tested")


def _gathered(sums: np.ndarray) -> np.ndarray:
    """The sums of every process, `[processes, ..]`."""
    if jax.process_count() == 1:
        return sums[None]
    # Bytes: 64-bit numbers would lose half of theirs on a device.
    found = multihost_utils.process_allgather(np.frombuffer(sums.tobytes(), np.uint8))
    return np.ascontiguousarray(found).view(sums.dtype).reshape(-1, *sums.shape)
