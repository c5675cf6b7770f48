"""Every kind of source at a URL gives what it gives on a disk."""

import io
import multiprocessing
import os
import pathlib
import sys
import tarfile

import fsspec
import numpy as np
import pytest

from dinov2_jax.data import tar_objects
from dinov2_jax.data.files import DISK, Store
from dinov2_jax.data.records import BadImage, DataError, Source
from dinov2_jax.data.sources import open_source
from tests.data.conftest import encode, make_image


@pytest.fixture(params=["memory", "gs"])
def place(request, tmp_path, monkeypatch) -> str:
    """A URL that has nothing below it; tar indexes are kept below `tmp_path`."""
    monkeypatch.setenv(tar_objects.VARIABLE, str(tmp_path / "tar_index"))
    root = request.getfixturevalue("bucket") if request.param == "gs" else "memory://data"
    return f"{root}/{tmp_path.name}"


def upload(folder: pathlib.Path, url: str) -> None:
    store, _ = fsspec.core.url_to_fs(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def content(source: Source, root: str) -> list:
    """All records, names relative to a root."""
    records = [source[i] for i in range(len(source))]
    return [(r.image, os.path.relpath(r.name, root), r.label) for r in records]


def assert_same(ours: Source, theirs: Source, url: str, folder: pathlib.Path) -> None:
    assert content(ours, url) == content(theirs, str(folder))
    assert ours.label_names == theirs.label_names
    assert ours.num_other_files == theirs.num_other_files
    assert [(os.path.relpath(name, url), reason) for name, reason in ours.rejected] == [
        (os.path.relpath(name, folder), reason) for name, reason in theirs.rejected
    ]


def test_a_folder_is_listed_in_the_order_of_a_disk(place, photo_folder):
    (photo_folder / "class_0" / "a.jpg").write_bytes(b"")
    (photo_folder / "class_1" / ".hidden.jpg").write_bytes(b"1")
    (photo_folder / "class_1" / "deep" / "er").mkdir(parents=True)
    (photo_folder / "class_1" / "deep" / "er" / "z.PNG").write_bytes(encode(make_image(9), "PNG"))
    (photo_folder / "class_1" / "notes.txt").write_text("no image")
    upload(photo_folder, place)
    source, local = open_source(f"{place}/"), open_source(str(photo_folder))
    assert len(source) == 25 and source.label_names == ("class_0", "class_1", "class_2")
    assert [reason for _, reason in source.rejected] == ["zero bytes"]
    assert source.num_other_files == 1
    assert_same(source, local, place, photo_folder)


def test_a_list_names_images_beside_it(place, photo_folder):
    lines = ["# images", "class_2/02.jpg\tcat", "", "class_0/../class_0/00.jpg\tdog"]
    (photo_folder / "some.txt").write_text("\r\n".join(lines))
    upload(photo_folder, place)
    source, local = open_source(f"{place}/some.txt"), open_source(str(photo_folder / "some.txt"))
    assert source.label_names == ("cat", "dog")
    assert_same(source, local, place, photo_folder)


def test_a_list_rejects_what_it_cannot_reach_and_a_missing_object_is_a_bad_image(place):
    lines = ["/etc/a.jpg", "gs://other/b.jpg", "c.jpg"]
    fsspec.core.url_to_fs(place)[0].pipe_file(f"{place}/some.txt", "\n".join(lines).encode())
    source = open_source(f"{place}/some.txt")
    assert [reason for _, reason in source.rejected] == ["absolute", "a URL"]
    with pytest.raises(BadImage, match="missing"):
        source[0]
    assert source.name(0) == f"{place}/c.jpg"


def test_image_files_by_a_pattern(place, photo_folder):
    upload(photo_folder, place)
    source = open_source(f"{place}/*/0*.jpg")
    assert_same(source, open_source(f"{photo_folder}/*/0*.jpg"), place, photo_folder)
    assert len(source) == 10
    assert len(open_source(f"{place}/class_0/03.jpg")) == 1


def write_tar(path: pathlib.Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path) -> pathlib.Path:
    """A folder of three shards, one of them empty, and one that is cut off."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        members = {}
        for i in range(5):
            members[f"{i}.jpg"] = encode(make_image(10 * shard + i))
            members[f"{i}.cls"] = str(i % 3).encode()
        members["readme.txt"] = b"x" * 5000
        write_tar(folder / f"{shard}.tar", members)
    (folder / "2.tar").write_bytes(b"")
    (folder / "3.tar").write_bytes((folder / "0.tar").read_bytes()[:9000])
    return folder


@pytest.mark.parametrize("chunk_bytes", [512, 4096, 2**24])
def test_tar_shards_are_read_once_and_their_index_is_kept(place, shards, monkeypatch, chunk_bytes):
    monkeypatch.setattr(tar_objects, "CHUNK_BYTES", chunk_bytes)
    upload(shards, place)
    ranges = []
    read_range = Store.read_range

    def counted(self, url, offset, size):
        ranges.append((url, offset, size))
        return read_range(self, url, offset, size)

    monkeypatch.setattr(Store, "read_range", counted)
    source = open_source(f"{place}/{{0..4}}.tar")
    local = open_source(f"{shards}/{{0..4}}.tar")
    for url in {url for url, _, _ in ranges}:  # forwards, and no byte twice but for the magic
        parts = [(offset, size) for u, offset, size in ranges if u == url]
        assert parts == sorted(parts)
        if chunk_bytes == 2**24:
            assert len(parts) == 1
    assert source.rejected[0][1] == "zero bytes" and source.rejected[-1][1] == "missing"
    local.rejected[-1] = (local.rejected[-1][0], "missing")  # the system says it at more length
    ranges.clear()
    again = open_source(f"{place}/{{0..4}}.tar")
    assert not ranges
    for ours in (source, again):
        assert_same(ours, local, place, shards)

    store, _ = fsspec.core.url_to_fs(place)
    store.pipe_file(f"{place}/1.tar", (shards / "0.tar").read_bytes())
    ranges.clear()
    assert open_source(f"{place}/{{0..4}}.tar")[5].image == local[0].image
    assert {url for url, _, _ in ranges if url.endswith("0.tar")} == set()


def test_a_damaged_index_is_made_again_and_one_that_cannot_be_kept_costs_time_only(
    shards, tmp_path, monkeypatch
):
    place = f"memory://{tmp_path.name}"
    upload(shards, place)
    kept = tmp_path / "kept"
    monkeypatch.setenv(tar_objects.VARIABLE, str(kept))
    size = len(open_source(f"{place}/0.tar"))
    (path,) = kept.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert len(open_source(f"{place}/0.tar")) == size == 5
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tar_objects.VARIABLE, str(tmp_path / "file"))
    assert len(open_source(f"{place}/0.tar")) == 5
    monkeypatch.setenv(tar_objects.VARIABLE, f"{place}/index")
    for _ in range(2):
        assert len(open_source(f"{place}/0.tar")) == 5
        assert len(fsspec.filesystem("memory").ls(f"/{tmp_path.name}/index")) == 1


def test_a_compressed_shard_is_refused(tmp_path):
    place = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").pipe_file(f"{place}/a.tar", b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match=r"a\.tar is compressed \(gzip\)"):
        open_source(f"{place}/a.tar")


def _read(source: Source, index: int, answers) -> None:
    answers.put(source[index].image)


def test_a_source_is_pickled_into_another_process(bucket, photo_folder, tmp_path):
    place = f"{bucket}/{tmp_path.name}"
    upload(photo_folder, place)
    source = open_source(place)
    assert source[0].image  # the connection is open when it is pickled
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_read, args=(source, 3, answers))
    process.start()
    assert answers.get(timeout=60) == source[3].image
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("{place}/none", "nothing found at"),
        ("{place}/none/*.jpg", "nothing found at"),
        ("{place}/a.array_record", r"copy them to every host, or use tar shards"),
        ("{place}/a.xyz", "is of no known kind"),
        ("{place}/empty", r"no image in folder .*1 files of other kinds"),
        ("nosuch://a/b", r"nosuch.*use a URL that fsspec knows"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(place, path, complaint):
    store, _ = fsspec.core.url_to_fs(place)
    for name in ("a.array_record", "a.xyz", "empty/a.txt"):
        store.pipe_file(f"{place}/{name}", b"1")
    with pytest.raises(DataError, match=complaint) as caught:
        open_source(path.format(place=place))
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(DataError, match="nothing found at 'gs://no-such-bucket/a'"):
        open_source("gs://no-such-bucket/a")


def test_without_gcsfs_the_pip_line(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"pip install 'dinov2_jax\[gcs\]'"):
        open_source("gs://bucket/a")


def test_a_disk_needs_no_fsspec(photo_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    source = open_source(str(photo_folder))
    assert source[0].image == DISK.read(source.name(0))
    assert np.array_equal(
        np.frombuffer(DISK.read_range(source.name(0), 3, 7), np.uint8),
        np.frombuffer(source[0].image[3:10], np.uint8),
    )
