"""Testing: sums over images, what is judged, examples."""

import types

import numpy as np
import pytest

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.dense.evaluate import evaluate_depths, evaluate_masks
from dinov2_jax.evals.dense.metrics import confusion, depth_errors

QUIET = dict(num_threads=2, is_shown=False)


class Listed:
    """A data set in memory."""

    def __init__(self, items):
        self._items = items
        self.pairs = [types.SimpleNamespace(name=str(i)) for i in range(len(items))]

    def __len__(self):
        return len(self._items)

    def read(self, index):
        return self._items[index]


def image(level):
    return np.full((4, 5, 3), level, np.uint8)


def test_masks_are_counted_over_all_images():
    rng = np.random.default_rng(0)
    truths = [rng.integers(-1, 3, (4, 5)).astype(np.int16) for _ in range(5)]
    dataset = Listed([(image(i), truth) for i, truth in enumerate(truths)])
    predict = lambda x: np.full((4, 5), x[0, 0, 0] % 3, np.int16)  # noqa: E731
    counts, examples = evaluate_masks(dataset, predict, num_classes=3, num_examples=3, **QUIET)
    expected = sum(confusion(np.full((4, 5), i % 3), truth, 3) for i, truth in enumerate(truths))
    np.testing.assert_array_equal(counts, expected)
    assert [example.name for example in examples] == ["0", "2", "4"]
    np.testing.assert_array_equal(examples[1].truth, truths[2])


def depth_set():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 12, (3, 4, 5)).astype(np.float32)
    depth[1] = 0  # nothing was measured
    depth[:, 0] = 0
    return depth, Listed([(image(i), x) for i, x in enumerate(depth)])


def judge(shape):
    is_judged = np.ones(shape, bool)
    is_judged[:, -1] = False
    return is_judged


SETTINGS = dict(is_judged=judge, num_examples=9, **QUIET)


def test_depth_is_judged_where_it_is_known_in_range_and_asked():
    depth, dataset = depth_set()
    predict = lambda x, size: np.full(size, 3.0, np.float32)  # noqa: E731
    found, count, examples = evaluate_depths(
        dataset, predict, depth_range=(0.001, 10.0), clip=None, **SETTINGS
    )
    each = []
    for i in (0, 2):
        truth = depth[i, 1:, :-1]
        truth = truth[(truth > 0.001) & (truth < 10)]
        each.append(depth_errors(np.full(truth.shape, 3.0), truth))
    assert count == 2
    assert found == pytest.approx({name: np.mean([x[name] for x in each]) for name in each[0]})
    assert len(examples) == 3


def test_clipped_depth_counts_as_the_clip():
    depth, dataset = depth_set()
    predict = lambda x, size: np.full(size, 9.5, np.float32)  # noqa: E731
    found, _, _ = evaluate_depths(dataset, predict, depth_range=(0.001, 80.0), clip=8.0, **SETTINGS)
    rmse = [np.sqrt(np.mean((np.minimum(x[1:, :-1], 8) - 8) ** 2)) for x in depth[[0, 2]]]
    assert found["rmse"] == pytest.approx(np.mean(rmse), rel=1e-6)


def test_no_depth_at_all_is_an_error():
    _, dataset = depth_set()
    with pytest.raises(DataError, match=r"none of 3 images has depth between 20 and 30 m"):
        evaluate_depths(
            dataset, lambda x, size: np.ones(size), depth_range=(20.0, 30.0), clip=None, **SETTINGS
        )
