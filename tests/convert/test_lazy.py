"""Arrays that are read on demand."""

import numpy as np

from dinov2_jax.convert import lazy


def count_loads(array):
    loads = []

    def load():
        loads.append(1)
        return array

    return lazy.LazyArray(array.shape, array.dtype, load), loads


def test_nothing_is_read_before_it_is_used():
    array = np.arange(12.0).reshape(6, 2)
    one, loads = count_loads(array)
    joined = lazy.concatenate([one, one])
    parts = lazy.split(one, 3)
    stacked = lazy.stack([one, one], np.transpose)
    assert (joined.shape, stacked.shape) == ((12, 2), (2, 2, 6))
    assert [part.shape for part in parts] == [(2, 2)] * 3
    assert joined.nbytes == 2 * array.nbytes and not loads
    np.testing.assert_array_equal(joined, np.concatenate([array, array]))
    np.testing.assert_array_equal(np.concatenate([np.asarray(p) for p in parts]), array)
    np.testing.assert_array_equal(stacked, np.stack([array.T, array.T]))
    assert len(loads) == 2 + 3 + 2
    assert np.asarray(one, np.int32).dtype == np.int32
