"""Shards appear whole or not at all, whatever was left by whoever was there before."""

import json
import sys

import numpy as np
import pytest

from dinov2_jax.features.folder_store import FolderStore
from dinov2_jax.features.index import FORMAT, format_index
from dinov2_jax.features.read import read
from dinov2_jax.features.table import Row, StoreError

INDEX = {
    "format": FORMAT,
    "what": "cls",
    "arrays": {"cls": {"dtype": "float32", "shape": [2]}},
    "images": 5,
    "shard_size": 2,
    "num_shards": 3,
    "label_names": ["cat", "dog"],
}


def write(store, number, *, bad=()):
    ids = [i for i in range(2 * number, min(2 * number + 2, 5)) if i not in bad]
    rows = [Row(i, f"path{i}", i % 2) for i in ids]
    store.append(rows, [(f"path{i}", "broken") for i in bad], {"cls": features(ids)})
    store.close_shard(number)


def features(ids):
    return np.array([[i, -i] for i in ids], np.float32).reshape(-1, 2)


def open_store(out, index=INDEX, process=(0, 1)) -> FolderStore:
    return FolderStore(out, index, process=process)


def test_what_is_written_is_read(tmp_path):
    with open_store(tmp_path / "out") as store:
        assert store.missing() == [0, 1, 2]
        write(store, 1, bad=(2, 3))
        write(store, 0, bad=(1,))
        assert store.missing() == [2] and store.num_bad() == 3
        assert not store.finish([])
        with pytest.raises(StoreError, match="2 of 3 shards are there; run the command"):
            read(tmp_path / "out")
        write(store, 2)
        assert store.finish([("path9", "zero\nbytes")])
    found = read(tmp_path / "out")
    assert found.ids.tolist() == [0, 4] and found.ids.dtype == np.int64
    assert found.paths == ["path0", "path4"]
    assert found.labels.tolist() == [0, 0] and found.label_names == ("cat", "dog")
    np.testing.assert_array_equal(found["cls"], features([0, 4]))
    assert found.index == INDEX | {"rows": [1, 0, 1], "bad_images": 4}
    assert (tmp_path / "out" / "bad_images.txt").read_text().splitlines() == [
        "path9\tzero bytes",
        "path1\tbroken",
        "path2\tbroken",
        "path3\tbroken",
    ]


def test_a_shard_that_was_not_closed_is_not_there(tmp_path):
    out = tmp_path / "out"
    with open_store(out) as store:
        write(store, 0)
        store.append([Row(2, "path2", 0)], [], {"cls": features([2])})
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == [
        "index.json",
        "shard-00000-of-00003",
    ]
    # As kill -9 leaves it: no exit has tidied up.
    (out / ".part-0-of-1").mkdir()
    (out / ".part-0-of-1" / "cls.npy").write_bytes(b"half")
    with open_store(out) as store:
        assert store.missing() == [1, 2]
        write(store, 1)
        write(store, 2)
        store.finish([])
    np.testing.assert_array_equal(read(out)["cls"], features(range(5)))


def test_killed_before_the_index_or_after_the_last_shard(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock-0-of-1").touch()
    (out / ".index.json.0-of-1").write_text('{"wh')
    with open_store(out) as store:
        for i in range(3):
            write(store, i)
    assert "rows" not in json.loads((out / "index.json").read_text())
    with open_store(out) as store:
        assert store.missing() == []
        assert store.finish([])
    assert len(read(out)) == 5


def test_several_processes_share_a_folder(tmp_path):
    out = tmp_path / "out"
    with open_store(out, process=(0, 2)) as one, open_store(out, process=(1, 2)) as two:
        with (
            pytest.raises(StoreError, match="is being written by another run"),
            open_store(out, process=(1, 2)),
        ):
            pass
        write(two, 1)
        write(one, 0)
        # Of another division: the shard is there already.
        with open_store(out, process=(0, 3)) as three:
            three.append([Row(0, "path0", 0), Row(1, "path1", 1)], [], {"cls": features([0, 1])})
            three.close_shard(0)
        write(one, 2)
        assert two.finish([]) and one.finish([])
    assert read(out).ids.tolist() == list(range(5))
    assert not list(out.glob(".part*"))


def test_folders_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(StoreError, match=r"holds photo\.jpg: it is a folder of something else"):
        open_store(tmp_path).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file cannot be written \(File exists\)"):
        open_store(tmp_path / "file").__enter__()
    (tmp_path / "broken").mkdir()
    for text in ("{", "[1]", '{"rows": 3}', '{"format": "dinov2_jax.features 99"}'):
        (tmp_path / "broken" / "index.json").write_text(text)
        with pytest.raises(StoreError, match="does not hold features of dinov2_jax"):
            open_store(tmp_path / "broken").__enter__()
        assert (tmp_path / "broken" / "index.json").read_text() == text
    assert not list(tmp_path.rglob(".lock*"))


def test_where_nothing_was_made_another_option_may_be_tried(tmp_path):
    out, other = tmp_path / "out", INDEX | {"what": "mean"}
    with open_store(out):
        pass
    with open_store(out, other) as store:
        assert store.missing() == [0, 1, 2]
    assert json.loads((out / "index.json").read_text()) == other
    # Unless others may be at work.
    with pytest.raises(StoreError, match="what: 'mean' -> 'cls'"):
        open_store(out, process=(0, 2)).__enter__()


def test_two_that_started_together_do_not_mix(tmp_path):
    """Both found nothing; the index is of the one that wrote last."""
    out = tmp_path / "out"
    with open_store(out) as store:
        store.append([Row(0, "path0", 0), Row(1, "path1", 1)], [], {"cls": features([0, 1])})
        (out / "index.json").write_text(format_index(INDEX | {"what": "mean"}))
        with pytest.raises(StoreError, match="what: 'mean' -> 'cls'"):
            store.close_shard(0)
        with pytest.raises(StoreError, match="what: 'mean' -> 'cls'"):
            store.finish([])
    assert not list(out.glob("shard-*"))


def test_a_changed_option_is_refused_and_changes_nothing(tmp_path):
    out = tmp_path / "out"
    with open_store(out) as store:
        write(store, 0)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name[0] != "."}
    changed = INDEX | {"what": "mean", "arrays": {"mean": {"dtype": "float16", "shape": [2]}}}
    with pytest.raises(
        StoreError, match=r"arrays.cls.dtype: 'float32' -> \(absent\).* what: 'cls'"
    ):
        open_store(out, changed).__enter__()
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name[0] != "."}


def test_without_pyarrow_the_error_has_the_pip_line_and_another_way(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(StoreError, match=r"pip install -e '.\[parquet\]'; or choose a file"):
        open_store(tmp_path / "out").__enter__()
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_utf8_are_kept_readable(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    index = INDEX | {"images": 2, "num_shards": 1, "label_names": []}
    with open_store(tmp_path / "out", index) as store:
        store.append([Row(0, name, None)], [(name, "broken")], {"cls": features([0])})
        store.close_shard(0)
        store.finish([])
    assert read(tmp_path / "out").paths == [r"caf\xe9.jpg"]
    assert (tmp_path / "out" / "bad_images.txt").read_text() == "caf\\xe9.jpg\tbroken\n"
    assert read(tmp_path / "out").labels is None
