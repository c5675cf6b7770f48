"""The feed: batches in order, one ahead, each copied whole."""

import threading
import time

import jax
import numpy as np

from dinov2_jax import feed as feed_lib
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


class _Device:
    """What a device computes: `jax.block_until_ready` waits for it."""

    def __init__(self):
        self.is_done = threading.Event()

    def block_until_ready(self):
        assert self.is_done.wait(60)


class _Clock:
    """Stands still; counts how often it is looked at."""

    now, looks = 0.0, 0

    def perf_counter(self):
        self.looks += 1
        return self.now


def test_waiting_counts_only_while_the_devices_have_nothing_to_do(monkeypatch):
    clock, device = _Clock(), _Device()
    monkeypatch.setattr(feed_lib, "time", clock)

    def batches():
        (batch,) = _batches(1)
        clock.now = 1.0  # the first one: nothing is computed before it
        yield batch
        clock.now = 3.0  # there before the step ends
        yield batch
        clock.now, looks = 10.0, clock.looks
        device.is_done.set()
        while clock.looks == looks:  # until the end of the step is noted
            time.sleep(0.001)
        clock.now = 14.0
        yield batch

    feed = Feed(batches(), make_mesh(), num_groups=8)
    for waited in (1.0, 0.0, 4.0):
        before = feed.wait_secs
        feed.peek(computing={"x": device} if before else None)
        assert feed.wait_secs - before == waited
        feed.take()
