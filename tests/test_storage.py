"""Files of a run: whole, growing, made locally; on a disk and in an object store."""

import pytest
from etils import epath

from dinov2_jax import storage
from dinov2_jax.storage import GrowingFile, is_url, made_locally, write_whole


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path) -> epath.Path:
    """A folder with nothing in it."""
    if request.param == "disk":
        return epath.Path(tmp_path)
    return epath.Path(request.getfixturevalue("bucket")) / tmp_path.name


def test_files_are_replaced_whole(folder):
    write_whole(folder / "a", "1")
    write_whole(folder / "a", "2")
    write_whole(folder / "b", b"\x00")
    assert (folder / "a").read_text() == "2" and (folder / "b").read_bytes() == b"\x00"
    assert len(list(folder.iterdir())) == 2


def test_a_growing_file_goes_on_with_what_is_there(folder):
    path = folder / "a.txt"
    GrowingFile(path).flush()
    assert not path.exists()
    for text in ("1\n", "2\n"):
        file = GrowingFile(path)
        file.add(text)
        file.add(text)
        file.flush()
    assert path.read_text() == "1\n1\n2\n2\n"


def test_a_file_on_a_disk_has_every_line_at_once(tmp_path):
    file = GrowingFile(epath.Path(tmp_path) / "a.txt")
    for i in range(3):
        file.add(f"{i}\n")
        assert (tmp_path / "a.txt").read_text().splitlines()[-1] == str(i)


def test_an_object_is_written_at_a_flush_and_now_and_then(bucket, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    path = epath.Path(bucket) / tmp_path.name / "a.txt"
    file = GrowingFile(path)
    texts = {}
    for at in (0.0, 1.0, storage.SECS_BETWEEN_WRITES - 1, storage.SECS_BETWEEN_WRITES, 61.5):
        now[0] = 100.0 + at
        file.add(f"{at}\n")
        texts[at] = path.read_text().count("\n")
    assert list(texts.values()) == [1, 1, 1, 4, 4]
    file.flush()
    assert path.read_text().count("\n") == 5


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_is_made_locally_arrives(folder, is_folder):
    target = folder / "made"
    with made_locally(target) as local:
        if is_folder:
            (local / "deep").mkdir(parents=True)
            (local / "deep" / "a.bin").write_bytes(b"1")
            (local / "b.bin").write_bytes(b"2")
        else:
            local.write_bytes(b"3")
    if is_folder:
        assert (target / "deep" / "a.bin").read_bytes() == b"1"
        assert (target / "b.bin").read_bytes() == b"2"
    else:
        assert target.read_bytes() == b"3"
    assert local.exists() != is_url(folder)


def test_what_was_not_completed_is_not_uploaded(bucket, tmp_path):
    target = epath.Path(bucket) / tmp_path.name / "made"
    with pytest.raises(KeyError), made_locally(target) as local:
        local.write_bytes(b"1")
        raise KeyError
    assert not target.exists() and not local.exists()
