"""Batches from a source, in threads and worker processes: a thin layer over Grain.

Everything in a batch is a function of (seed, global index) alone, where image i of step t has index
t * global_batch_size + i. Hosts, workers and threads only divide the work, and any step can be
the first. A whole batch is one element of the Grain data set, so workers cannot regroup it.
"""

import contextlib
import gc
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from dinov2_jax.data.batch import Batch
from dinov2_jax.data.batch_builder import BatchBuilder
from dinov2_jax.data.masking import BlockMasks
from dinov2_jax.data.multicrop import NUM_GLOBAL_CROPS, MultiCrop
from dinov2_jax.data.records import Source


class Batches(Iterator[Batch]):
    """Iterator of batches, prefetched; also a context manager.

    Attributes:
      step: of the next batch.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        *,
        start_step: int,
        total_steps: int,
        num_workers: int,
        prefetch_batches: int,
    ):
        # Not at the top of the file: importing grain imports jax where that is installed.
        import absl.flags
        import grain

        self.step = start_step
        self._builder, self._has_workers = builder, num_workers > 0
        # Two batches are under way at a time, so that the pool of threads is busy at the seams.
        under_way = min(2, builder.num_threads)
        per_process = max(under_way, 1 if num_workers else prefetch_batches)
        batches = (
            grain.MapDataset.range(start_step, total_steps)
            .map(builder)
            .to_iter_dataset(grain.ReadOptions(under_way, per_process))
        )
        if num_workers:
            if not absl.flags.FLAGS.is_parsed():  # Grain reads flags of its own
                absl.flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=num_workers,
                    per_worker_buffer_size=max(1, prefetch_batches // num_workers),
                ),
                worker_init_fn=_start_worker,
            )
            # Shared memory is scarce and its arrays outlive the interpreter badly: copy them out,
            # in a thread of their own.
            batches = grain.experimental.ThreadPrefetchIterDataset(
                batches.map(_copy_batch), prefetch_buffer_size=1
            )
        with _signals_blocked():
            self._iterator = iter(batches)
            if num_workers:
                self._iterator.start_prefetch()

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise ValueError("these batches are closed; call make_batches again")
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise RuntimeError(
                f"a data worker died, at step {self.step} or later ({error}); if it ran out of "
                "memory, lower loader.num_workers or loader.prefetch_batches"
            ) from error
        self.step += 1
        return batch

    def close(self) -> None:
        """Stops threads and workers, drops what they prefetched; safe to call twice."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            self._builder.close()
            if self._has_workers:
                gc.collect()  # Grain's cycles would hold shared memory until the interpreter ends

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def make_batches(
    source: Source,
    *,
    seed: int,
    global_batch_size: int,
    group_size: int,
    multicrop: MultiCrop,
    masks: BlockMasks,
    total_steps: int,
    start_step: int = 0,
    num_channels: int = 3,
    max_image_pixels: int = 200_000_000,
    num_workers: int = 0,
    num_threads: int = 4,
    prefetch_batches: int = 4,
    groups: Sequence[int] | None = None,
) -> Batches:
    """Iterates over the batches of the steps `start_step` to `total_steps - 1`.

    An image that cannot be read is replaced by another record of the same source, chosen by (seed,
    index); `Batch.bad_record` names it.

    Args:
      source: of `open_source` or `open_mixture`.
      seed: at least 0; of order, crops, augmentation and masks.
      global_batch_size: images a step, over all hosts.
      group_size: images a group; divides the batch.
      multicrop: what is cut from each image.
      masks: of one group; its `num_crops` must be 2 * group_size.
      num_channels: 1, 3 or 4 (any for sources of arrays).
      max_image_pixels: a larger image counts as unreadable.
      num_workers: processes, each of which builds whole batches; 0: threads of this process.
      num_threads: in each process.
      prefetch_batches: built ahead of use, about.
      groups: which groups of each batch this host builds, ascending; None: all.

    Raises:
      ValueError: sizes that do not divide each other.
    """
    if global_batch_size % group_size:
        raise ValueError(f"{global_batch_size=} must be a multiple of {group_size=}")
    num_groups = global_batch_size // group_size
    groups = range(num_groups) if groups is None else sorted(groups)
    if not set(groups) <= set(range(num_groups)):
        raise ValueError(f"groups={list(groups)} must be some of the batch's {num_groups}")
    if masks.num_crops != NUM_GLOBAL_CROPS * group_size:
        raise ValueError(
            f"{masks.num_crops=} must be 2 * {group_size=}: masks are drawn over a group's crops"
        )
    if not 0 <= start_step <= total_steps:
        raise ValueError(f"{start_step=} must lie between 0 and {total_steps=}")
    builder = BatchBuilder(
        source=source,
        seed=seed,
        global_batch_size=global_batch_size,
        group_size=group_size,
        groups=groups,
        multicrop=multicrop,
        masks=masks,
        num_channels=num_channels,
        max_image_pixels=max_image_pixels,
        num_threads=num_threads,
    )
    return Batches(
        builder,
        start_step=start_step,
        total_steps=total_steps,
        num_workers=num_workers,
        prefetch_batches=prefetch_batches,
    )


def _copy_batch(batch: Batch) -> Batch:
    return Batch(*(np.array(array) for array in batch))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Threads that begin here, and the processes that they start, never receive SIGTERM or SIGINT.

    Ctrl-C, SLURM and Kubernetes send a signal to every process: the main one decides when its
    workers end, because it may need batches until all hosts have agreed on a last step.
    """
    # Starting Python's own helper process unblocks the signals of the thread that does it.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker_index: int, num_workers: int) -> None:
    """Runs first in every worker process."""
    # Grain and the main module may have imported jax here: it must not take an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Ends this process once its parent is gone: a killed run must not leave workers behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
