"""Images that cannot be read: replaced, named, never the end of the pipeline."""

import os

import numpy as np
import pytest

from dinov2_jax.data.mixture import Mixture
from dinov2_jax.data.order import Order
from dinov2_jax.data.records import BadImage, DataError
from dinov2_jax.data.sources import open_source
from dinov2_jax.faults import PassingFault
from tests.data.conftest import encode, make_image
from tests.data.small_batches import Arrays, assert_same, read_batches, records_of


def test_bad_records_are_replaced_and_named():
    bad, order = {3, 17, 41}, Order((50,), seed=0)
    good = read_batches(Arrays(), total_steps=20)
    seen = set()
    for batch, expected in zip(read_batches(Arrays(bad=bad), total_steps=20), good, strict=True):
        records, meant = records_of(batch), records_of(expected)
        is_bad = np.isin(meant, list(bad))
        np.testing.assert_array_equal(batch.bad_record, np.where(is_bad, meant, -1))
        np.testing.assert_array_equal(records[~is_bad], meant[~is_bad])
        for index, record in zip(batch.index[is_bad].tolist(), records[is_bad], strict=True):
            tries = (order.replacement(index, attempt) for attempt in range(10))
            assert record == next(i for i in tries if i not in bad)
        # All but the pixels is as if nothing had happened.
        np.testing.assert_array_equal(batch.global_augment, expected.global_augment)
        np.testing.assert_array_equal(batch.masks, expected.masks)
        seen |= set(batch.bad_record.tolist())
    assert seen == bad | {-1}


def test_replacements_are_the_same_on_any_host_and_thread():
    source = Arrays(bad=range(0, 50, 2))
    whole = read_batches(source)
    assert (whole[0].bad_record >= 0).any()
    assert_same(read_batches(source, num_threads=8), whole)
    halves = [read_batches(source, groups=groups) for groups in ([0, 1], [2, 3])]
    np.testing.assert_array_equal(
        np.concatenate([half[2].global_crops for half in halves]), whole[2].global_crops
    )


def test_damage_of_every_kind_never_stops_the_pipeline(photo_folder):
    """Found at the scan or at the decoding; the source names both."""
    damage = {
        "truncated.jpg": encode(make_image(0, height=300, width=300))[:3000],
        "half.png": encode(make_image(0), "PNG")[:400],
        "huge.png": encode(make_image(0, height=200, width=300), "PNG"),
        "empty.jpg": b"",
        "text.jpg": b"hello",
    }
    for name, content in damage.items():
        (photo_folder / "class_0" / name).write_bytes(content)
    source = open_source(str(photo_folder))
    assert sorted(os.path.basename(name) for name, _ in source.rejected) == [
        "empty.jpg",
        "text.jpg",
    ]
    (photo_folder / "class_1" / "04.jpg").unlink()
    batches = read_batches(source, total_steps=10, max_image_pixels=10_000)
    bad = np.unique(np.concatenate([batch.bad_record for batch in batches]))
    names = {os.path.basename(source.name(i)) for i in bad[bad >= 0].tolist()}
    assert names == {"truncated.jpg", "half.png", "huge.png", "04.jpg"}


def test_a_source_of_bad_images_only_is_an_error():
    with pytest.raises(DataError, match=r"100 records in a row.*zero bytes.*beginning with array"):
        read_batches(Arrays(bad=range(50)))


class Faulty(Arrays):
    """Some of its records a store does not give, after all tries."""

    def __getitem__(self, index):
        if index in self._bad:
            try:
                raise OSError(5, "EIO") from ConnectionError("reset")
            except OSError as error:
                raise BadImage("EIO") from error
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_store_that_is_gone_is_no_wrong_data(num_workers):
    with pytest.raises(
        PassingFault, match=r"3 records of arrays .*EIO.*run the same command again"
    ):
        read_batches(Faulty(bad=range(50)), num_workers=num_workers)


def test_single_records_that_a_store_does_not_give_are_replaced():
    batches = read_batches(Faulty(bad=(3, 20)))
    bad = np.concatenate([batch.bad_record for batch in batches])
    assert set(bad[bad >= 0].tolist()) == {3, 20}


def test_a_replacement_comes_from_the_same_part_of_a_mixture():
    parts = [Arrays(num=10, bad=range(9)), Arrays(num=100, first=100)]
    batches = read_batches(Mixture(parts, [0.5, 0.5]), total_steps=8)
    bad = np.concatenate([batch.bad_record for batch in batches])
    records = np.concatenate([records_of(batch) for batch in batches])
    assert set(records[bad >= 0]) == {9}  # the only good one of the first part
    assert (records < 100).sum() == 32
