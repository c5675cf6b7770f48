"""Numbers class by class."""

import numpy as np

from dinov2_jax.evals.classes import class_details


def test_details():
    labels = np.array([0] * 10 + [1] * 10)
    predicted = np.array([0] * 8 + [1, 2] + [0] * 4 + [1] * 6)
    assert class_details(predicted, labels, ["cat", "dog", "cow"]) == {
        "per_class": {"cat": 80.0, "dog": 60.0},
        "confusions": {"dog -> cat": 4, "cat -> dog": 1, "cat -> cow": 1},
    }
    assert class_details(labels, labels, ["cat", "dog"])["confusions"] == {}
