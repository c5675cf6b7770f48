"""The feed: batches in order, one ahead, each copied whole."""

import jax
import numpy as np

from dinov2_jax.data.batch import Batch
from dinov2_jax.feed import Feed
from dinov2_jax.sharding import DEVICE_FIELDS, make_mesh


def _batches(count):
    for number in range(count):
        fields = {name: np.full((8, 3), number, np.float32) for name in Batch._fields}
        yield Batch(**fields)


def test_batches_come_in_order_and_peeking_takes_none():
    feed = Feed(_batches(3), make_mesh(), num_groups=8)
    for number in range(3):
        assert feed.peek() is feed.peek()
        fed = feed.take()
        assert set(fed.device) == set(DEVICE_FIELDS)
        assert fed.host.index[0, 0] == number
        for array in fed.device.values():
            assert len(array.sharding.device_set) == len(jax.devices())
            np.testing.assert_array_equal(array, number)
    assert feed.wait_secs > 0
