"""`.pth` files: PyTorch takes what we write, and pages that were dropped are read again."""

import ml_dtypes
import numpy as np
import pytest

from dinov2_jax.convert.spec import METADATA_KEY
from dinov2_jax.convert.torch_file import read_torch, write_torch
from tests.parity import require

pytestmark = pytest.mark.parity


def test_a_module_loads_the_file_with_its_facts(tmp_path):
    torch = require("torch")
    module = torch.nn.Linear(3, 2)
    flat = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(2, np.float32)}
    write_torch(tmp_path / "x.pth", flat, {METADATA_KEY: "{}"})
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    module.load_state_dict(state, strict=True)
    np.testing.assert_array_equal(module.weight.detach().numpy(), flat["weight"])
    read, metadata = read_torch(tmp_path / "x.pth")
    assert metadata == {METADATA_KEY: "{}"}
    for name, array in flat.items():
        np.testing.assert_array_equal(read[name], array, strict=True)


def test_arrays_can_be_read_twice(tmp_path):
    """Larger than a page, so that pages are dropped after the first time."""
    require("torch")
    array = np.random.default_rng(0).standard_normal((300, 100)).astype(np.float32)
    odd = np.arange(3, dtype=np.int64)
    half = array.astype(ml_dtypes.bfloat16)
    write_torch(tmp_path / "x.pth", {"a": array, "odd": odd, "half": half}, {})
    flat, _ = read_torch(tmp_path / "x.pth")
    for _ in range(2):
        for name, expected in (("a", array), ("odd", odd), ("half", half)):
            assert flat[name].shape == expected.shape and flat[name].dtype == expected.dtype
            np.testing.assert_array_equal(np.asarray(flat[name]), expected, strict=True)


def test_legacy_files_are_read(tmp_path):
    """From before the zip format: not mapped."""
    torch = require("torch")
    tensor = torch.randn(300, 100)
    torch.save({"model": {"a": tensor}}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    flat, metadata = read_torch(tmp_path / "x.pth")
    for _ in range(2):
        np.testing.assert_array_equal(flat["a"], tensor.numpy())
    assert metadata == {}


def test_views_are_written_as_they_look(tmp_path):
    torch = require("torch")
    array = np.arange(6.0).reshape(2, 3)
    write_torch(tmp_path / "x.pth", {"t": array.T, "r": np.broadcast_to(array[0], (4, 3))}, {})
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    np.testing.assert_array_equal(state["t"].numpy(), array.T)
    assert state["r"].shape == (4, 3)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    torch = require("torch")
    path = tmp_path / "x.pth"
    write_torch(path, {"a": np.zeros(3)}, {})

    def fail(content, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"cannot write .*x\.pth: PytorchStreamWriter"):
        write_torch(path, {"a": np.ones(3)}, {})
    np.testing.assert_array_equal(read_torch(path)[0]["a"], np.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
