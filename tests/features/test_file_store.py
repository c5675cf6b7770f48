"""One file of a small set: what is written is read, whole or not there."""

import ml_dtypes
import numpy as np
import pytest

from dinov2_jax.features.file_store import FileStore
from dinov2_jax.features.index import FORMAT
from dinov2_jax.features.read import read
from dinov2_jax.features.table import Row, StoreError

FORMATS = ("npz", "safetensors")


def make_index(dtype="float32", *, label_names=("cat", "dog"), images=3):
    return {
        "format": FORMAT,
        "what": "cls",
        "arrays": {"cls": {"dtype": dtype, "shape": [2]}},
        "images": images,
        "shard_size": 0,
        "num_shards": 1,
        "label_names": list(label_names),
    }


def fill(store, *, labelled=True, dtype=np.float32):
    assert store.missing() == [0] and store.num_bad() == 0
    for i in (0, 2):
        rows = [Row(i, f"path{i}", i // 2 if labelled else None)]
        store.append(rows, [], {"cls": np.full((1, 2), i + 0.5, dtype)})
    store.append([], [("path1", "broken")], {})
    store.close_shard(0)
    assert store.finish([])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read(tmp_path, suffix, dtype):
    out = tmp_path / f"x.{suffix}"
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    with FileStore(out, make_index(dtype)) as store:
        fill(store, dtype=kind)
    found = read(out)
    assert found["cls"].dtype == kind
    np.testing.assert_array_equal(found["cls"].astype(np.float32), [[0.5, 0.5], [2.5, 2.5]])
    assert found.ids.tolist() == [0, 2] and found.paths == ["path0", "path2"]
    assert found.labels.tolist() == [0, 1] and found.label_names == ("cat", "dog")
    assert found.index == make_index(dtype) | {"rows": [2], "bad_images": 1}
    assert (tmp_path / f"x.{suffix}.bad_images.txt").read_text() == "path1\tbroken\n"
    with FileStore(out, make_index(dtype)) as store:
        assert store.missing() == [] and store.finish([])
    with pytest.raises(StoreError, match=r"label_names: \['cat', 'dog'\] -> \[\]"):
        FileStore(out, make_index(dtype, label_names=[])).__enter__()
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, f"{out.name}.bad_images.txt"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_labels_and_no_rows(tmp_path, suffix):
    out = tmp_path / f"x.{suffix}"
    with FileStore(out, make_index(label_names=[])) as store:
        store.append([], [("path0", "broken")], {})
        store.close_shard(0)
        store.finish([])
    found = read(out)
    assert len(found) == 0 and found["cls"].shape == (0, 2) and found.labels is None


def test_a_large_set_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"would hold 8.0 GB, more than .*; choose a folder"):
        FileStore(tmp_path / "x.npz", make_index(images=10**9)).__enter__()
    with pytest.raises(StoreError, match="must be a folder; create it"):
        FileStore(tmp_path / "no" / "x.npz", make_index()).__enter__()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x00" * 100])
def test_another_file_is_not_replaced(tmp_path, suffix, content):
    out = tmp_path / f"x.{suffix}"
    out.write_bytes(content)
    with pytest.raises(StoreError, match="does not hold features of dinov2_jax"):
        FileStore(out, make_index()).__enter__()
    assert out.read_bytes() == content
