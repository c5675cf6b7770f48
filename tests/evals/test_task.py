"""Labels that a task needs."""

import numpy as np
import pytest

from dinov2_jax.evals.task import require_classes, require_labels
from dinov2_jax.features.read import FeatureSet


def features(labels) -> FeatureSet:
    count = 3 if labels is None else len(labels)
    return FeatureSet(
        arrays={},
        ids=np.arange(count),
        paths=["a"] * count,
        labels=labels,
        label_names=tuple("abcde"),
        index={},
    )


def test_labels_of_two_classes_are_given():
    labels = np.array([0, 4, 4])
    assert require_labels(features(labels), at="train", layout="L") is labels
    require_classes(2, at="train", layout="L")


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="2 of 4 labels of train are none, such as 5"):
        require_labels(features(np.array([0, 5, -1, 4])), at="train", layout="L")


@pytest.mark.parametrize(("labels", "count"), [(None, 0), (np.array([2, 2]), 1)])
def test_fewer_are_refused_with_the_layout(labels, count):
    expected = rf"train of X must hold .* two or more classes, found {count}; expected: a drawing"
    with pytest.raises(ValueError, match=expected):
        require_labels(features(labels), at="train of X", layout="a drawing")
