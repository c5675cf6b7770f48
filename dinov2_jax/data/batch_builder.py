"""Builds one batch: reads and decodes records, cuts crops, draws augmentation and masks.

Everything in it is a function of (seed, global index) alone. An image that cannot be read is
replaced by another, chosen by the same rule, and named.
"""

import concurrent.futures
from collections.abc import Sequence

import numpy as np

from dinov2_jax.data.batch import Batch, batch_layout
from dinov2_jax.data.image_ops import decode
from dinov2_jax.data.masking import BlockMasks
from dinov2_jax.data.multicrop import NUM_GLOBAL_CROPS, MultiCrop
from dinov2_jax.data.order import ELEMENT, MASKS, Order, stream_rng
from dinov2_jax.data.records import BadImage, DataError, Source
from dinov2_jax.faults import PassingFault, may_pass

_MAX_REPLACEMENTS = 100  # of one image, one after the other
# Of them by what may pass, each of which a store was asked for some 20 s or more: so many are no
# images' fault.
_MAX_FAULTS = 3


class BatchBuilder:
    """Builds this host's part of the batch of any step. Pickled into the workers.

    Args:
      source, seed, multicrop, masks, num_channels, max_image_pixels: see `make_batches`.
      global_batch_size: over all hosts.
      group_size: images in a group.
      groups: this host's part of the batch: which of its groups, ascending.
      num_threads: that decode and crop; 1: the caller's.
    """

    def __init__(
        self,
        *,
        source: Source,
        seed: int,
        global_batch_size: int,
        group_size: int,
        groups: Sequence[int],
        multicrop: MultiCrop,
        masks: BlockMasks,
        num_channels: int,
        max_image_pixels: int,
        num_threads: int,
    ):
        self._source, self._seed = source, seed
        parts = getattr(source, "sources", [source])
        self._order = Order(
            tuple(len(part) for part in parts), seed=seed, weights=getattr(source, "weights", ())
        )
        self._global_batch_size, self._group_size = global_batch_size, group_size
        self._groups = tuple(groups)
        self._multicrop, self._masks = multicrop, masks
        self._reading = {"num_channels": num_channels, "max_pixels": max_image_pixels}
        self.num_threads = num_threads
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def __call__(self, step: int) -> Batch:
        """Builds the batch of a step (steps count from 0)."""
        size = self._group_size
        # Groups and images are numbered through from the first step of the run on.
        groups = int(step) * (self._global_batch_size // size) + np.array(self._groups, np.int64)
        batch = self._allocate((groups[:, None] * size + np.arange(size)).ravel())
        rows = range(len(batch.index))
        if self.num_threads == 1:
            for row in rows:
                self._fill_row(batch, row)
        else:
            list(self._threads().map(lambda row: self._fill_row(batch, row), rows))
        for i, group in enumerate(groups.tolist()):
            masks, indices, weights = self._masks(stream_rng(self._seed, MASKS, group))
            batch.masks[i] = masks
            batch.mask_indices[i] = indices
            batch.mask_weights[i] = weights
        return batch

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill_row(self, batch: Batch, row: int) -> None:
        index = int(batch.index[row])
        image, batch.bad_record[row] = self._read(index)
        rng = stream_rng(self._seed, ELEMENT, index)
        augmentation = self._multicrop.draw_augmentation(rng)
        batch.global_augment[row] = augmentation[:NUM_GLOBAL_CROPS]
        batch.local_augment[row] = augmentation[NUM_GLOBAL_CROPS:]
        self._multicrop(
            image, rng, global_crops=batch.global_crops[row], local_crops=batch.local_crops[row]
        )

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """The image at a position, or its replacement, and the record that was bad (-1: none)."""
        record = first_record = self._order.record(index)
        num_faults = 0
        for attempt in range(_MAX_REPLACEMENTS):
            try:
                image = decode(self._source[record].image, **self._reading)
                return image, -1 if attempt == 0 else first_record
            except BadImage as error:
                reason, num_faults = str(error), num_faults + may_pass(error)
                if num_faults == _MAX_FAULTS:
                    raise PassingFault(
                        f"{num_faults} records of {self._source.path} could not be read for one "
                        f"image (the last: {reason}); this may pass: run the same command again"
                    ) from error
            record = self._order.replacement(index, attempt)
        raise DataError(
            f"{_MAX_REPLACEMENTS} records in a row could not be read (the last: {reason}); "
            f"check {self._source.path}, beginning with {self._source.name(first_record)}"
        )

    def _allocate(self, index: np.ndarray) -> Batch:
        rows, groups = len(index), len(self._groups)
        crops, masks = self._multicrop, self._masks
        layout = batch_layout(
            images=rows,
            groups=groups,
            global_crop_size_px=crops.global_crop_size_px,
            local_crop_size_px=crops.local_crop_size_px,
            num_local_crops=crops.num_local_crops,
            num_channels=self._reading["num_channels"],
            crops_per_group=masks.num_crops,
            patches=masks.rows * masks.cols,
            max_masked_patches=masks.max_masked_patches,
        )
        fields = {name: np.empty(shape, dtype) for name, (shape, dtype) in layout.items()}
        return Batch(**fields | {"index": index})

    def _threads(self) -> concurrent.futures.ThreadPoolExecutor:
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(
                self.num_threads, thread_name_prefix="dinov2-data"
            )
        return self._pool

    def __getstate__(self):
        return self.__dict__ | {"_pool": None}
