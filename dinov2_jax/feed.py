"""Batches on their way to the device: one is copied while the step before it computes."""

import time
from collections.abc import Iterator
from typing import NamedTuple

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
        self.wait_secs = 0.0  # spent waiting for the host's pipeline since it was last reset
        self._next: Fed | None = None

    def peek(self) -> Fed:
        """The next batch; it stays the next."""
        if self._next is None:
            started = time.perf_counter()
            batch = next(self._batches)
            self.wait_secs += time.perf_counter() - started
            self._next = Fed(put_batch(batch, self._mesh, num_groups=self._num_groups), batch)
        return self._next

    def take(self) -> Fed:
        """The next batch, which the caller is about to use."""
        fed = self.peek()
        self._next = None
        return fed
