"""Batches: functions of (seed, index) alone, whatever divides the work; workers; resumption."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_jax.data.batch import AUGMENT_COLUMNS, Batch
from dinov2_jax.data.masking import BlockMasks
from dinov2_jax.data.order import Order
from dinov2_jax.data.sources import open_source
from tests.data.small_batches import (
    GLOBAL_BATCH_SIZE,
    TOTAL_STEPS,
    Arrays,
    assert_same,
    make_small_batches,
    read_batches,
    records_of,
)


class WorkerArrays(Arrays):
    """Refuses to work in a worker that could reach an accelerator; may kill its worker."""

    def __init__(self, num=50, killer=-1):
        super().__init__(num)
        self._killer = killer

    def __getitem__(self, index):
        if multiprocessing.parent_process() is not None:
            platforms = sys.modules["jax"].config.jax_platforms if "jax" in sys.modules else "cpu"
            if platforms != "cpu" or os.environ["JAX_PLATFORMS"] != "cpu":
                raise RuntimeError(f"a worker may use {platforms}")
            if index == self._killer:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_batch_is_what_batch_py_says(photo_folder):
    (batch, *_) = read_batches(open_source(str(photo_folder)))
    b, s, q, n, m = 8, 4, 2, 16, BlockMasks(rows=4, cols=4, num_crops=4).max_masked_patches
    expected = {
        "global_crops": ((b, 2, 16, 16, 3), np.uint8),
        "local_crops": ((b, 3, 8, 8, 3), np.uint8),
        "global_augment": ((b, 2, len(AUGMENT_COLUMNS)), np.float32),
        "local_augment": ((b, 3, len(AUGMENT_COLUMNS)), np.float32),
        "masks": ((s, 2 * q, n), bool),
        "mask_indices": ((s, m), np.int32),
        "mask_weights": ((s, m), np.float32),
        "index": ((b,), np.int64),
        "bad_record": ((b,), np.int64),
    }
    assert {k: (v.shape, v.dtype) for k, v in batch._asdict().items()} == expected
    assert batch.index.tolist() == list(range(8))
    assert (batch.bad_record == -1).all()
    assert batch.global_crops.std(axis=(2, 3)).min() > 0
    for group in range(s):
        weights = batch.mask_weights[group]
        np.testing.assert_array_equal(
            batch.mask_indices[group][weights > 0], np.flatnonzero(batch.masks[group])
        )


def test_records_come_in_the_global_order():
    order = Order((50,), seed=0)
    for batch in read_batches(Arrays(), total_steps=10):
        assert records_of(batch).tolist() == [order.record(i) for i in batch.index.tolist()]


def test_images_are_cropped_differently_each_time(photo_folder):
    """Three records: each comes several times in a batch, never with the same crop."""
    for name in sorted(photo_folder.rglob("*.jpg"))[3:]:
        name.unlink()
    batch = read_batches(open_source(str(photo_folder)), total_steps=1)[0]
    crops = batch.global_crops.reshape(16, -1)
    assert len(np.unique(crops, axis=0)) == 16
    assert len(np.unique(batch.global_augment[:, :, 1:5].reshape(16, -1), axis=0)) == 16
    assert len({masks.tobytes() for masks in batch.masks}) == 4


@pytest.mark.parametrize(
    "parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 3], [1, 2]]], ids=["2", "4", "mixed"]
)
def test_hosts_share_one_batch(photo_folder, parts):
    """Whichever groups a host builds, it builds them as a single host would."""
    source = open_source(str(photo_folder))
    whole = read_batches(source)
    for groups in parts:
        rows = [2 * group + i for group in groups for i in range(2)]
        expected = [
            Batch(*(x[groups] if len(x) == 4 else x[rows] for x in batch)) for batch in whole
        ]
        assert_same(read_batches(source, groups=groups), expected)


@pytest.mark.parametrize("settings_", [{"num_threads": 8}, {"num_threads": 2}])
def test_threads_change_nothing(photo_folder, settings_):
    source = open_source(str(photo_folder))
    assert_same(read_batches(source, prefetch_batches=3, **settings_), read_batches(source))


def test_workers_change_nothing_and_stay_off_accelerators(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")  # what the workers would inherit
    source = WorkerArrays()
    assert_same(read_batches(source, num_workers=2, start_step=1), read_batches(source)[1:])


def test_a_worker_that_dies_is_an_error_not_a_hang():
    killer = Order((50,), seed=0).record(2 * GLOBAL_BATCH_SIZE + 3)
    with make_small_batches(WorkerArrays(killer=killer), num_workers=1) as batches:
        with pytest.raises(RuntimeError, match=r"a data worker died.*lower loader\.num_workers"):
            list(batches)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), start_step=st.integers(0, TOTAL_STEPS))
def test_any_step_can_be_the_first(seed, start_step):
    source = Arrays()
    whole = read_batches(source, seed=seed)
    assert_same(read_batches(source, seed=seed, start_step=start_step), whole[start_step:])


def test_far_steps_cost_nothing_and_seeds_differ():
    far = read_batches(Arrays(), start_step=10**9, total_steps=10**9 + 1)[0]
    assert far.index[0] == 8 * 10**9
    other = read_batches(Arrays(), seed=1)[0]
    first = read_batches(Arrays())[0]
    for name in ("global_crops", "global_augment", "local_augment", "masks"):
        assert (getattr(first, name) != getattr(other, name)).any()


def test_the_iterator_counts_its_steps():
    with make_small_batches(Arrays(), start_step=2) as batches:
        assert batches.step == 2
        next(batches)
        assert batches.step == 3
        next(batches)
        with pytest.raises(StopIteration):
            next(batches)
    with pytest.raises(ValueError, match="closed; call make_batches again"):
        next(batches)
    batches.close()


def test_masking_can_be_off():
    masks = BlockMasks(rows=4, cols=4, num_crops=4, mask_probability=0.0)
    batch = read_batches(Arrays(), masks=masks)[0]
    assert batch.masks.shape == (4, 4, 16) and not batch.masks.any()
    assert batch.mask_indices.shape == batch.mask_weights.shape == (4, 0)


@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_channel_numbers(photo_folder, num_channels):
    batch = read_batches(open_source(str(photo_folder)), num_channels=num_channels, total_steps=1)[
        0
    ]
    assert batch.global_crops.shape == (8, 2, 16, 16, num_channels)
    assert batch.global_crops[..., 0].std() > 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"global_batch_size": 9}, "global_batch_size=9 must be a multiple of group_size=2"),
        ({"groups": [1, 4]}, r"groups=\[1, 4\] must be some of the batch's 4"),
        ({"masks": BlockMasks(rows=4, cols=4, num_crops=2)}, r"must be 2 \* group_size=2"),
        ({"start_step": 5}, "start_step=5 must lie between 0 and total_steps=4"),
    ],
)
def test_sizes_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_small_batches(Arrays(), **wrong)


def test_other_failures_of_a_source_are_raised():
    class Broken(Arrays):
        def __getitem__(self, index):
            raise KeyError("a bug, not a bad image")

    with pytest.raises(KeyError, match="a bug"):
        read_batches(Broken())


ORPHAN = """
import multiprocessing, os, signal
from tests.data.small_batches import Arrays, make_small_batches

if __name__ == "__main__":
    with make_small_batches(Arrays(), num_workers=1) as batches:
        next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_of_a_killed_run_end_by_themselves(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    # The workers hold the pipe too: read the line only.
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert process.wait() == -signal.SIGKILL and workers
    deadline = time.monotonic() + 30
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.stdout.close()


TO_THE_GROUP = """
import multiprocessing, os, signal
from tests.data.small_batches import Arrays, make_small_batches

if __name__ == "__main__":
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    with make_small_batches(
        Arrays(), total_steps=12, num_workers=2, prefetch_batches=1
    ) as batches:
        while len(multiprocessing.active_children()) < 2:
            pass
        os.killpg(0, signal.SIGTERM)  # the workers are being born
        next(batches)
        os.killpg(0, signal.SIGTERM)
        os.killpg(0, signal.SIGINT)
        print(len(list(batches)), *received)
    print(*multiprocessing.active_children())
"""


def test_a_signal_to_the_whole_group_leaves_the_workers_at_work_until_they_are_closed(tmp_path):
    script = tmp_path / "group.py"
    script.write_text(TO_THE_GROUP)
    result = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (result.returncode, result.stdout) == (0, "11 15 15 2\n\n"), result.stderr


def _is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie, which nobody may be there to collect."""
    try:
        os.kill(pid, 0)
        status = pathlib.Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
