"""A source in memory and small batches of it, for the tests of the pipeline."""

import numpy as np

from dinov2_jax.data.batch import Batch
from dinov2_jax.data.masking import BlockMasks
from dinov2_jax.data.multicrop import MultiCrop
from dinov2_jax.data.pipeline import Batches, make_batches
from dinov2_jax.data.records import Record, Source

GLOBAL_BATCH_SIZE, GROUP_SIZE, TOTAL_STEPS = 8, 2, 4


class Arrays(Source):
    """Images in memory, each of one colour: its number, from `first` on."""

    path, kind = "arrays", "memory"

    def __init__(self, num=50, bad=(), first=0):
        self._num, self.rejected, self._bad, self._first = num, [], frozenset(bad), first

    def __len__(self):
        return self._num

    def __getitem__(self, index):
        if index in self._bad:
            return Record(b"", self.name(index), None)
        return Record(np.full((20, 24, 3), self._first + index, np.uint8), self.name(index), 0)

    def name(self, index):
        return f"array {index}"


def make_small_batches(source, **settings_) -> Batches:
    group_size = settings_.get("group_size", GROUP_SIZE)
    arguments = {
        "seed": 0,
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "group_size": group_size,
        "multicrop": MultiCrop(global_crop_size_px=16, local_crop_size_px=8, num_local_crops=3),
        "masks": BlockMasks(rows=4, cols=4, num_crops=2 * group_size),
        "total_steps": TOTAL_STEPS,
        "num_threads": 1,
    }
    return make_batches(source, **(arguments | settings_))


def read_batches(source, **settings_) -> list[Batch]:
    with make_small_batches(source, **settings_) as batches:
        return list(batches)


def assert_same(ours: list[Batch], expected: list[Batch]):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def records_of(batch: Batch) -> np.ndarray:
    """Which record of `Arrays` each row shows."""
    colours = batch.global_crops[:, 0, 0, 0, 0]
    assert (batch.global_crops == colours[:, None, None, None, None]).all()
    assert (batch.local_crops == colours[:, None, None, None, None]).all()
    return colours.astype(int)
