"""Which photos are taken, how they are called, and what becomes of those that cannot be read."""

import functools

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.data.image_ops import resize_center_crop
from dinov2_jax.data.records import BadImage, Record, Source
from dinov2_jax.visualize.photos import PhotoReader, open_images, short_names, spaced_rows


class Photos(Source):
    path, kind, rejected = "p", "memory", [("photo 11", "not an image")]

    def __len__(self):
        return 10

    def name(self, index):
        return f"a/photo {index}"

    def __getitem__(self, index):
        if index == 4:
            raise BadImage("gone")
        image = b"broken" if index == 6 else np.full((20, 30, 3), index, np.uint8)
        return Record(image, self.name(index), None)


@pytest.fixture
def reader():
    return PhotoReader(Photos(), prepare=functools.partial(resize_center_crop, resize=14, crop=14))


def test_samples_are_evenly_spaced_readable_and_prepared(reader):
    photos = reader.sample(5)
    assert [photo.name for photo in photos] == ["photo 0", "photo 2", "photo 8"]
    assert [photo.pixels.shape for photo in photos] == [(14, 14, 3)] * 3
    assert [int(photo.pixels[0, 0, 0]) for photo in photos] == [0, 2, 8]
    assert reader.rejected == [
        ("photo 11", "not an image"),
        ("a/photo 4", "gone"),
        ("a/photo 6", "not an image"),
    ]
    assert len(reader.sample(50)) == 8


def test_too_large_photos_are_passed_over():
    reader = PhotoReader(Photos(), prepare=lambda image: image, max_image_pixels=599)
    assert reader.sample(3) == []
    (photo,) = PhotoReader(Photos(), prepare=lambda image: image, num_channels=1).sample(1)
    assert photo.pixels.shape == (20, 30, 1)


def test_strips_are_passed_over():
    prepare = functools.partial(resize_center_crop, resize=400, crop=14)
    reader = PhotoReader(Photos(), prepare=prepare)
    assert len(reader.sample(1)) == 1
    reader = PhotoReader(Photos(), prepare=functools.partial(prepare, resize=20_000))
    assert reader.sample(1) == []
    assert "30 x 20 pixels would become 30000 x 20000" in reader.rejected[-1][1]


def test_rows_keep_their_numbers(reader):
    assert [row for row, _ in reader([3, 4, 1])] == [3, 1]
    assert list(reader.read([3, 4, 1])) == [3, 1]


@pytest.mark.parametrize(
    ("num_rows", "count", "rows"), [(10, 4, [0, 2, 5, 7]), (3, 9, [0, 1, 2]), (0, 4, [])]
)
def test_spaced_rows(num_rows, count, rows):
    assert spaced_rows(num_rows, count) == rows


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/x/a/1.jpg", "/x/a/2.jpg"], ["1.jpg", "2.jpg"]),
        (["/x/a/1.jpg", "/x/b/1.jpg", "c.jpg"], ["a/1.jpg", "b/1.jpg", "c.jpg"]),
        (["1.jpg", "b/1.jpg"], ["1.jpg", "b/1.jpg"]),
        (["/x/1.jpg", "/x/1.jpg"], ["1.jpg", "1.jpg"]),
        (["a/\udcff.jpg"], ["\\xff.jpg"]),  # a byte that is no UTF-8; HTML and fonts take text
        ([], []),
    ],
)
def test_names_are_as_short_as_tells_them_apart(names, short):
    assert short_names(names) == short


def test_several_paths_are_one_source(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("b.png", "a.png", "folder/c.png", "folder/d.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("b.png", "folder", "a.png")]
    source = open_images(paths)
    assert [source.name(i)[len(str(tmp_path)) + 1 :] for i in range(len(source))] == [
        "b.png",
        "folder/c.png",
        "folder/d.png",
        "a.png",
    ]
    assert len(open_images(paths[:1])) == 1
