"""What every classification reports: numbers class by class, in words and as charts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov2_jax.evals.charts import class_sheets
from dinov2_jax.evals.scores import per_class_accuracy
from dinov2_jax.evals.task import Run


def report_classes(
    run: Run, predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> Mapping[str, Any]:
    """Draws the charts of a task into its folder, and gives its record's details.

    Args:
      run: of the task.
      predicted: classes `[rows]`.
      labels: of them.
      names: of the classes.

    Returns:
      `per_class`: per cent right by class name; `confusions`: how often "this -> is taken for
      that", the commonest first.
    """
    title = f"{run.flags.task.name} of {run.model.name or 'the model'}"
    run.draw(lambda: class_sheets(predicted, labels, names, title=title))
    return class_details(predicted, labels, names)


def class_details(
    predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """The details of `report_classes`; classes without images have none."""
    accuracy, _ = per_class_accuracy(predicted, labels, len(names))
    is_wrong = predicted != labels
    pairs = np.stack([labels, predicted], axis=1)[is_wrong]
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {
        "per_class": {
            name: 100 * float(share)
            for name, share in zip(names, accuracy, strict=True)
            if np.isfinite(share)
        },
        "confusions": {
            f"{names[i]} -> {names[j]}": int(count)
            for (i, j), count in zip(pairs[order], counts[order], strict=True)
        },
    }
