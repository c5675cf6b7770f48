"""Batches keep shards apart; images of one size or an error; bad ones are named."""

import numpy as np
import pytest

from dinov2_jax.data.records import BadImage, DataError
from dinov2_jax.data.sources import open_source
from dinov2_jax.features.reader import Image, Reader, make_batches, shard_range
from dinov2_jax.features.table import Row
from tests.data.conftest import encode, make_image
from tests.evals.stand_ins import ListSource
from tests.features.conftest import BAD, NUM_IMAGES

CROP = {"resize_size_px": 18, "crop_size_px": 12, "patch_size": 4}
WHOLE = CROP | {"crop_size_px": None}


def images(*good: bool):
    for i, is_good in enumerate(good):
        yield Image(Row(i, f"n{i}", None), np.full(3, i) if is_good else None, "broken")


def test_no_batch_spans_two_shards_and_bad_images_leave_no_hole():
    found = list(
        make_batches(images(1, 1, 0, 1, 1, 1, 0, 0), [(7, 5), (9, 1), (11, 2)], batch_size=3)
    )
    assert [[row.id for row in batch.rows] for batch in found] == [[0, 1, 3], [4], [5], []]
    assert [batch.shard for batch in found] == [7, 7, 9, 11]
    assert [batch.is_last for batch in found] == [False, True, True, True]
    assert [batch.bad for batch in found] == [
        [("n2", "broken")],
        [],
        [],
        [("n6", "broken"), ("n7", "broken")],
    ]
    for batch in found:
        assert [int(x[0]) for x in batch.pixels] == [row.id for row in batch.rows]


def test_shards_cover_every_image_once():
    index = {"shard_size": 5, "images": 12}
    assert [list(shard_range(index, i)) for i in range(3)] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11],
    ]
    assert shard_range({"shard_size": 0, "images": 12}, 0) == range(12)


def test_images_are_those_of_the_models_preprocessing(photos, model):
    source = open_source(str(photos))
    reader = Reader(source, CROP, num_channels=3)
    assert reader.image_shape == (12, 12, 3)
    for i in range(NUM_IMAGES):
        image = reader(i)
        assert image.row.path == source.name(i) and image.row.id == i
        name = image.row.path.rpartition("/")[2]
        if name in {f"{bad:02d}.jpg" for bad in BAD}:
            assert image.pixels is None and image.reason
            continue
        assert image.row.label == source[i].label is not None
        expected = model.preprocess(source[i].image)[0]
        normal = (image.pixels / 255 - model.spec.mean) / model.spec.std
        np.testing.assert_allclose(normal, expected, rtol=1e-5, atol=1e-5)


def test_without_a_crop_the_first_readable_image_gives_the_size():
    wide, high = make_image(0, height=20, width=40), make_image(1, height=40, width=20)
    source = ListSource([BadImage("gone"), encode(wide), encode(high)], ["a", "b", "c"])
    reader = Reader(source, WHOLE, num_channels=3)
    assert reader.image_shape == (16, 36, 3)  # 18 x 36 to the nearest multiples of 4
    assert reader(0).reason == "gone" and reader(1).pixels.shape == (16, 36, 3)
    with pytest.raises(ValueError, match=r"but b is 16 x 36 and c 36 x 16 .*; crop them"):
        reader(2)
    with pytest.raises(DataError, match=r"none of 1 images .* can be read"):
        Reader(ListSource([BadImage("gone")], ["a"]), WHOLE, num_channels=3)


def test_a_strip_is_a_bad_image_not_the_end():
    source = ListSource([np.zeros((1, 9000, 3), np.uint8)], ["strip"])
    sizes = CROP | {"resize_size_px": 256}
    image = Reader(source, sizes, num_channels=3)(0)
    assert image.pixels is None and "9000 x 1 pixels would become" in image.reason
