"""Numbers class by class."""

import numpy as np

from dinov2_jax.evals.classes import class_details


def test_details():
    confusion = np.array([[8, 1, 1], [4, 6, 0], [0, 0, 0]])
    assert class_details(confusion, ["cat", "dog", "cow"]) == {
        "per_class": {"cat": 80.0, "dog": 60.0},
        "confusions": {"dog -> cat": 4, "cat -> dog": 1, "cat -> cow": 1},
    }
