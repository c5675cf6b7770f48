"""Faults of a store: those that may pass are tried again, then said as such; others stay."""

import io
import tarfile

import fsspec
import pytest

from dinov2_jax.data import files as files_lib
from dinov2_jax.data import tar_objects
from dinov2_jax.data.records import BadImage, DataError
from dinov2_jax.data.sources import open_source
from dinov2_jax.faults import PassingFault
from tests.data.conftest import encode, make_image


class _Refused(Exception):
    code = 403


class _Unavailable(Exception):
    code = 503


@pytest.mark.parametrize(
    ("faults", "calls", "error"),
    [
        ([], 1, None),
        ([ConnectionError("reset")] * 3, 4, None),
        ([ConnectionError("reset\nby peer")] * 4, 4, "ConnectionError: reset by peer"),
        ([_Refused("no access")], 1, "no access"),
        ([OSError("Forbidden: a/b")], 1, "Forbidden"),
        ([FileNotFoundError("a/b")], 1, "missing"),
    ],
)
def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_a_bad_image(
    tmp_path, monkeypatch, faults, calls, error
):
    pauses = []
    monkeypatch.setattr(files_lib.time, "sleep", pauses.append)
    place, image = f"memory://{tmp_path.name}", encode(make_image(0))
    memory = fsspec.filesystem("memory", use_listings_cache=False)
    memory.pipe_file(f"{place}/a.jpg", image)
    source = open_source(place)
    cat_file, asked = type(memory).cat_file, []

    def faulty(self, url):
        asked.append(url)
        if len(asked) <= len(faults):
            raise faults[len(asked) - 1]
        return cat_file(self, url)

    monkeypatch.setattr(type(memory), "cat_file", faulty)
    if error:
        with pytest.raises(BadImage, match=error):
            source[0]
    else:
        assert source[0].image == image
    assert len(asked) == calls and pauses == list(files_lib.PAUSES_SECS[: calls - 1])


def test_a_folder_that_cannot_be_listed_is_no_smaller_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files_lib, "PAUSES_SECS", ())
    memory = fsspec.filesystem("memory")
    place = f"memory://{tmp_path.name}"
    for name in ("a/1.jpg", "b/2.jpg"):
        memory.pipe_file(f"{place}/{name}", encode(make_image(0)))
    ls = type(memory).ls

    def faulty(self, path, **kwargs):
        if path.endswith("b"):
            raise ConnectionError("reset")
        return ls(self, path, **kwargs)

    def refuse(self, path, **kwargs):
        raise _Refused("no access")

    monkeypatch.setattr(type(memory), "ls", faulty)
    with pytest.raises(PassingFault, match=r"cannot be read \(ConnectionError: reset\)"):
        open_source(place)
    monkeypatch.setattr(type(memory), "ls", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(_Refused: no access\)"):
        open_source(place)


@pytest.mark.parametrize("name", ["some.txt", "0.tar"])
def test_a_list_or_a_shard_that_cannot_be_read_now_is_not_left_out(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files_lib, "PAUSES_SECS", ())
    monkeypatch.setenv(tar_objects.VARIABLE, str(tmp_path / "tar_index"))
    memory = fsspec.filesystem("memory")
    place = f"memory://{tmp_path.name}"
    image = encode(make_image(0))
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = len(image)
        tar.addfile(info, io.BytesIO(image))
    for file in ("0.tar", "1.tar"):
        memory.pipe_file(f"{place}/{file}", content.getvalue())
    memory.pipe_file(f"{place}/some.txt", b"a.jpg")
    cat_file = type(memory).cat_file

    def faulty(self, path, **kwargs):
        if path.endswith(name):
            raise _Unavailable("busy")
        return cat_file(self, path, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", faulty)
    with pytest.raises(PassingFault, match=r"_Unavailable: busy.*run the same command again"):
        open_source(f"{place}/some.txt" if name == "some.txt" else f"{place}/{{0..1}}.tar")
