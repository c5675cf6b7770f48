"""The door: which path opens what, and what is said about a path that opens nothing."""

import pytest

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
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.jpg at '.*' is of no known kind"):
        open_source(str(tmp_path / "a.jpg"))
