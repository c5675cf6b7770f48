"""The door: which path opens what, and what is said about a path that opens nothing."""

import os

import pytest
from PIL import Image

from dinov2_jax.data.array_record import ArrayRecordSource
from dinov2_jax.data.folder import FileSource
from dinov2_jax.data.pack import pack
from dinov2_jax.data.photos import PhotosSource
from dinov2_jax.data.records import DataError
from dinov2_jax.data.sources import open_source


def test_paths_open_their_kind(photo_folder, tmp_path, monkeypatch):
    assert isinstance(open_source(str(photo_folder)), FileSource)
    assert isinstance(open_source("photos:right"), PhotosSource)
    monkeypatch.setenv("HOME", str(photo_folder.parent))
    assert len(open_source("~/photos")) == 24
    pack(open_source(str(photo_folder)), str(tmp_path / "packed"), num_shards=1)
    packed = open_source(str(tmp_path / "packed" / "*.array_record*"))
    assert isinstance(packed, ArrayRecordSource)


def test_image_files_are_a_source(tmp_path):
    for name in ("b.JPG", "a[1].png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "d.png").write_bytes(b"x")
    one = open_source(str(tmp_path / "a[1].png"))
    assert (len(one), one.name(0)) == (1, str(tmp_path / "a[1].png"))
    assert one[0].image == (tmp_path / "a[1].png").read_bytes() and one[0].label is None
    several = open_source(str(tmp_path / "*.*"))
    names = [os.path.basename(several.name(i)) for i in range(len(several))]
    assert names == ["a[1].png", "b.JPG", "c.png"]
    assert several.rejected == [(str(tmp_path / "d.png"), "not an image")]
    with pytest.raises(DataError, match=r"d\.png: not an image; use a file that holds an image"):
        open_source(str(tmp_path / "d.png"))


@pytest.mark.parametrize(
    "path, message",
    [
        ("", "the path is empty; it must be a folder"),
        ("/no/such/folder", "nothing found at '/no/such/folder'; it must be a folder"),
        ("/no/such/*.tar", "nothing found"),
        ("/no/such/list.txt", "nothing found"),
    ],
)
def test_paths_that_open_nothing(path, message):
    with pytest.raises(DataError, match=message):
        open_source(path)


def test_files_of_no_known_kind(tmp_path):
    (tmp_path / "a.dat").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.dat at '.*' is of no known kind"):
        open_source(str(tmp_path / "a.dat"))
