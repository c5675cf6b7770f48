"""Batches on their way to the device: one is copied while the step before it computes."""

import concurrent.futures
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dinov2_jax.data.batch import Batch
from dinov2_jax.sharding import put_batch


class Fed(NamedTuple):
    """A batch, on the device and on the host."""

    device: dict[str, jax.Array]
    host: Batch


class Feed:
    """Holds the next batch, already on its way to the device."""

    def __init__(self, batches: Iterator[Batch], mesh: Mesh, *, num_groups: int):
        """Takes this host's part of each batch of `num_groups` groups; see `put_batch`."""
        self._batches = iter(batches)
        self._mesh, self._num_groups = mesh, num_groups
        # Spent waiting for the host's pipeline while the devices had nothing to do.
        self.wait_secs = 0.0
        self._next: Fed | None = None
        self._watch = concurrent.futures.ThreadPoolExecutor(1, "feed")

    def peek(self, computing: Any = None) -> Fed:
        """The next batch; it stays the next.

        Args:
          computing: arrays that the devices compute meanwhile, if any: waiting for a batch costs
            nothing before they are there.
        """
        if self._next is None:
            idle = self._watch.submit(_when_ready, computing)
            started = time.perf_counter()
            batch = next(self._batches)
            arrived = time.perf_counter()
            if idle.done():
                self.wait_secs += max(arrived - max(started, idle.result()), 0.0)
            self._next = Fed(put_batch(batch, self._mesh, num_groups=self._num_groups), batch)
        return self._next

    def take(self) -> Fed:
        """The next batch, which the caller is about to use."""
        fed = self.peek()
        self._next = None
        return fed


def _when_ready(arrays: Any) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()
