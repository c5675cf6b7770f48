"""The work: shards that are missing, through the network, into a store."""

import collections
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dinov2_jax.data.ahead import map_ahead
from dinov2_jax.data.records import DataError, Source, too_many_bad
from dinov2_jax.features.extractor import Arrays, FeatureExtractor
from dinov2_jax.features.file_store import FileStore
from dinov2_jax.features.folder_store import FolderStore
from dinov2_jax.features.reader import Batch, Image, Reader, make_batches, shard_range
from dinov2_jax.features.table import Bad, one_line
from dinov2_jax.model import Model
from dinov2_jax.progress import Display
from dinov2_jax.sharding import make_mesh

FINITE = "finite"  # beside the arrays of a batch: which rows are


class Report(NamedTuple):
    """What one call of `extract` did."""

    images: int  # that this call computed or found bad
    bad: list[Bad]  # name and reason of the latter
    images_per_sec: float  # after the first batch, which waits for the compiler
    data_wait_share: float  # of that time, spent waiting for decoded images
    is_complete: bool  # whether `read` finds everything


class Clock:
    """Images per second, and the share of the time that was spent waiting for them."""

    def __init__(self):
        self.images, self._waited = 0, 0.0
        self._since: tuple[float, int, float] | None = None
        self._start = (time.perf_counter(), 0, 0.0)

    def waiting(self, items: Iterable[Image]) -> Iterator[Image]:
        """The same items; the time that they take to come is counted."""
        items, end = iter(items), object()
        while True:
            started = time.perf_counter()
            item = next(items, end)
            self._waited += time.perf_counter() - started
            if item is end:
                return
            yield item

    def count(self, num_images: int) -> None:
        """So many more are done; the first ones only start the clock: they were compiled for."""
        self.images += num_images
        if self._since is None:
            self._since = (time.perf_counter(), self.images, self._waited)

    def rates(self) -> tuple[float, float]:
        """Images per second, share of the time waited: since the first batch, if it has ended."""
        since = self._since
        if since is None or since[1] == self.images:
            since = self._start
        elapsed = max(time.perf_counter() - since[0], 1e-9)
        return (self.images - since[1]) / elapsed, min((self._waited - since[2]) / elapsed, 1.0)

    def __str__(self) -> str:
        rate, waited = self.rates()
        return f"{rate:.4g} images/s, {waited:.0%} of the time waiting for data"


def fill_store(
    store: FolderStore | FileStore,
    index: Mapping[str, Any],
    *,
    source: Source,
    reader: Reader,
    model: Model,
    compute: Callable[[Any, jax.Array], dict[str, jax.Array]],
    per_device_batch_size: int,
    num_threads: int,
    max_bad_fraction: float,
    process: tuple[int, int],
    about: Sequence[str],
    quiet: bool,
) -> Report:
    """Makes this process's shards that are missing.

    Args:
      store, index: entered, and what it was made with.
      about: lines to begin with.
      others: see `extract`.
    """
    process_index, process_count = process
    mine = range(process_index, index["num_shards"], process_count)
    lengths = {i: len(shard_range(index, i)) for i in mine}
    missing = [i for i in store.missing() if i in lengths]
    done = sum(lengths.values()) - sum(lengths[i] for i in missing)
    num_bad = len(source.rejected) + store.num_bad()
    bad, clock, under_way = [], Clock(), collections.deque()
    params, extractor = make_extractor(model, compute, per_device_batch_size)
    numbers = itertools.chain.from_iterable(shard_range(index, i) for i in missing)
    ahead = 2 * max(extractor.batch_size, num_threads)
    images = map_ahead(reader, numbers, num_threads=num_threads, ahead=ahead)

    def batches() -> Iterator[list[np.ndarray]]:
        parts = [(i, lengths[i]) for i in missing]
        for batch in make_batches(clock.waiting(images), parts, batch_size=extractor.batch_size):
            under_way.append(batch)
            yield batch.pixels

    def check_bad(count: int) -> None:
        num_images = len(source) + len(source.rejected)
        if too_many_bad(count, num_images, max_bad_fraction):
            path = store.name_bad(source.rejected)
            raise DataError(
                f"{count} of {num_images} images cannot be read, more than max_bad_fraction="
                f"{max_bad_fraction:g} allows; they are named in {path}: repair or remove them "
                "(dinov2_jax.features may be told to allow more)"
            )

    total = sum(lengths.values())
    with (
        contextlib.closing(images),
        Display(total=total, done=done, unit="image", is_shown=not quiet) as display,
    ):
        for line in about:
            display.line(line)
        if done:
            display.line(f"{done:,} of {total:,} images are done: going on")
        check_bad(num_bad)
        for arrays in extractor.stream(params, batches()):
            batch: Batch = under_way.popleft()
            _check_finite(batch, arrays)
            store.append(batch.rows, batch.bad, arrays)
            if batch.is_last:
                store.close_shard(batch.shard)
            for name, reason in batch.bad:
                display.line(f"left out: {one_line(name)}: {one_line(reason)}")
            bad += batch.bad
            check_bad(num_bad + len(bad))
            clock.count(len(batch.rows) + len(batch.bad))
            display.advance(done + clock.images)
            display.show(done + clock.images, str(clock))
    is_complete = store.finish(source.rejected)
    return Report(clock.images, bad, *clock.rates(), is_complete)


def make_extractor(model: Model, compute, per_device_batch_size: int):
    """The parameters on every device of this host, and what computes with them."""
    devices = jax.local_devices()
    mesh, params = None, model.params
    if len(devices) > 1:
        mesh = make_mesh(devices=devices)
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def checked(params, images: jax.Array) -> dict[str, jax.Array]:
        found = compute(params, images)
        finite = [jnp.isfinite(x).all(axis=range(1, x.ndim)) for x in found.values()]
        return found | {FINITE: jnp.stack(finite).all(axis=0)}

    return params, FeatureExtractor(
        checked,
        mean=model.spec.mean,
        std=model.spec.std,
        batch_size=per_device_batch_size * len(devices),
        mesh=mesh,
    )


def _check_finite(batch: Batch, arrays: Arrays) -> None:
    finite = arrays.pop(FINITE, np.ones(0, bool))
    if not finite.all():
        row = int(np.argmin(finite))
        names = [name for name, x in arrays.items() if not np.isfinite(x[row]).all()]
        is_half = arrays[names[0]].dtype == np.float16
        raise ValueError(
            f"{' and '.join(names)} of {batch.rows[row].path} must be finite; "
            + (
                "float16 ends at 65504: take bfloat16 or float32, and another target"
                if is_half
                else "the model's weights are not sound: take those before they broke"
            )
        )
