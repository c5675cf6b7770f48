"""Writing beside: whole or as it was, and nothing left over."""

import pytest

from dinov2_jax.beside import written_beside


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_appears_when_all_of_it_is_written(tmp_path, before):
    path = tmp_path / "a.txt"
    if before:
        path.write_text(before)
    with written_beside(path) as beside:
        assert not beside.exists()
        beside.write_text("ne")
        assert (path.read_text() if before else None) == before
        with beside.open("a") as file:
            file.write("w")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_folder_takes_the_place_of_a_full_one(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").touch()
    with written_beside(path) as beside:
        beside.mkdir()
        (beside / "new").touch()
        assert names(path) == ["old"]
    assert names(path) == ["new"] and names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_a_failure_all_is_as_it_was(tmp_path, kind):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_beside(path) as beside:
        (beside / "new").mkdir(parents=True) if kind == "folder" else beside.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_what_a_killed_caller_left_is_removed(tmp_path):
    (tmp_path / ".a.tmp" / "half").mkdir(parents=True)
    (tmp_path / ".a.other").write_text("of another caller, at work")
    with written_beside(tmp_path / "a") as beside:
        beside.write_text("new")
    assert names(tmp_path) == [".a.other", "a"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append((tmp_path / "a").exists()))
    with written_beside(tmp_path / "a") as beside:
        beside.write_text("new")
    assert synced == [False]
