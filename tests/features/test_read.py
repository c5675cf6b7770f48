"""Arrays in shards are indexed as the whole would be."""

import numpy as np
import pytest

from dinov2_jax.features.read import FeatureSet, ShardedArray, read

WHOLE = np.arange(7 * 3 * 2, dtype=np.float32).reshape(7, 3, 2)
SHARDED = ShardedArray([WHOLE[:3], WHOLE[3:4], WHOLE[4:]], (3, 2), np.dtype(np.float32))


@pytest.mark.parametrize(
    "key",
    [
        0,
        3,
        -1,
        np.int64(4),
        slice(None),
        slice(2, 5),
        slice(None, None, -2),
        slice(5, 5),
        [6, 0, 3, 3],
        np.array([[1, 4], [5, 0]]),
        WHOLE[:, 0, 0] > 15,
        (4, 1),
        (slice(1, 6), 2, 0),
        ([5, 1], slice(None), 1),
        ([5, 1], 2),
        (slice(None, None, 3), slice(1, None), slice(None, None, -1)),
        (-2, slice(None), 0),
        (WHOLE[:, 0, 0] > 15, -1),
        np.array(5),
        True,
        [],
        (),
    ],
    ids=repr,
)
def test_indexing_is_numpys(key):
    np.testing.assert_array_equal(SHARDED[key], WHOLE[key])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (..., "numpy.asarray"),
        ((..., 0), "numpy.asarray"),
        ((slice(None), None), "numpy.asarray"),
        (([0, 1], [2, 2]), "only rows may be listed"),
        ((slice(None), [0, 2]), "only rows may be listed"),
        ((0, True), "only rows may be listed"),
        ((0, 0, 0, 0), "too many indices"),
        ((slice(None), 3), "out of bounds"),
        (-8, "out of range"),
    ],
    ids=repr,
)
def test_other_keys_are_refused_not_misread(key, message):
    with pytest.raises(IndexError, match=message):
        SHARDED[key]


def test_it_behaves_like_an_array():
    assert SHARDED.shape == WHOLE.shape and len(SHARDED) == 7
    np.testing.assert_array_equal(SHARDED, WHOLE)
    np.testing.assert_array_equal(np.stack(list(SHARDED)), WHOLE)
    assert np.asarray(SHARDED, np.float64).dtype == np.float64
    with pytest.raises(IndexError):
        SHARDED[7]
    with pytest.raises(ValueError, match="leave copy=False out"):
        np.array(SHARDED, copy=False)
    empty = ShardedArray([], (3, 2), np.dtype(np.float16))
    assert np.asarray(empty).shape == (0, 3, 2) and np.asarray(empty).dtype == np.float16


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="does not hold features of dinov2_jax"):
        read(tmp_path)
    with pytest.raises(ValueError, match="nowhere does not hold features"):
        read(tmp_path / "nowhere")
    found = FeatureSet({"cls": WHOLE}, np.arange(7), [""] * 7, None, (), {})
    with pytest.raises(KeyError, match="'mean' must be one of"):
        found["mean"]
