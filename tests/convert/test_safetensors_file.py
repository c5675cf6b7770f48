"""The archival file: exact, whole or not there, and readable by the library alone."""

import errno
import os

import numpy as np
import pytest
import safetensors.numpy

from dinov2_jax.convert.safetensors_file import read_safetensors, write_safetensors

FLAT = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.float32(3.5).reshape(()),
    "c": np.arange(4, dtype=np.int32),
}


def test_round_trip(tmp_path):
    path = tmp_path / "teacher.safetensors"
    write_safetensors(path, FLAT, {"variant": "vit_small"})
    flat, metadata = read_safetensors(path)
    assert metadata == {"variant": "vit_small"}
    assert flat.keys() == FLAT.keys()
    for name, array in FLAT.items():
        np.testing.assert_array_equal(flat[name], array, strict=True)
    assert safetensors.numpy.load_file(path).keys() == FLAT.keys()
    assert os.listdir(tmp_path) == [path.name]


def test_views_are_written_as_they_look(tmp_path):
    stack = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    flat = {"transposed": stack[1].T, "strided": stack[:, ::2], "repeated": stack[:1, 0].T}
    write_safetensors(tmp_path / "x.safetensors", flat, {})
    read, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {}
    for name, array in flat.items():
        np.testing.assert_array_equal(read[name], array, strict=True)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "teacher.safetensors"
    write_safetensors(path, FLAT, {})

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"cannot write .*teacher.safetensors: .*No space .*; free"):
        write_safetensors(path, {"new": FLAT["c"]}, {})
    assert read_safetensors(path)[0].keys() == FLAT.keys()
    assert os.listdir(tmp_path) == [path.name]


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "teacher.safetensors"
    write_safetensors(path, FLAT, {})

    def die(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"new": FLAT["c"]}, {})
    assert read_safetensors(path)[0].keys() == FLAT.keys()


def test_missing_folder(tmp_path):
    with pytest.raises(OSError, match="cannot write"):
        write_safetensors(tmp_path / "nowhere" / "x.safetensors", FLAT, {})


@pytest.mark.parametrize("size", [0, 4, 60, 200])
def test_truncated_file(tmp_path, size):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, FLAT, {"note": "n" * 100})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"must be a whole safetensors file .*; fetch it again"):
        read_safetensors(path)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "x.safetensors")
