"""The command: what it prints, its exit codes, and that wrong input leaves nothing."""

import os
import re
import sys

import pytest

from dinov2_jax.convert import write_model
from dinov2_jax.export import __main__, check, export_model
from dinov2_jax.export.__main__ import main
from tests.convert.models import make_params, make_spec

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def source(tmp_path):
    spec = make_spec("registers")
    write_model(tmp_path / "in.safetensors", spec, make_params(spec), format="safetensors")
    return tmp_path / "in.safetensors"


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_it_says_what_it_wrote_and_how_far_it_is(source, tmp_path, capsys, monkeypatch):
    target, measured = tmp_path / "out", {}

    def recorded(**flags):
        measured.update(export_model(**flags))
        return measured

    monkeypatch.setattr(__main__, "export_model", recorded)
    arguments = ["--format", "stablehlo", "--size", "16x20", "--num-heads", 4]
    code, out, err = run(capsys, source, target, *arguments)
    assert (code, err) == (0, [])
    assert out[0] == f"wrote {target}: {target.stat().st_size / 1e6:.1f} MB"
    assert out[1].startswith(f"largest difference from {source} in batches of 1 and 3")
    said = re.search(r"cls (\S+), registers (\S+), patches (\S+) \(bound 1e-04\)$", out[1])
    names = ["cls", "registers", "patches"]
    assert list(said.groups()) == [f"{measured[name]:.1e}" for name in names]
    # The program as it was and as it is read back: not compiled alike on every machine.
    assert max(measured.values()) < 1e-6


def test_a_square_size(source, tmp_path, capsys):
    assert run(capsys, source, tmp_path / "o.stablehlo", "--size", "20")[0] == 0
    assert '\\"height_px\\": 20, \\"width_px\\": 20' in (tmp_path / "o.stablehlo.json").read_text()


def test_too_large_a_difference_is_exit_code_1(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "BOUND", -1.0)
    code, out, err = run(capsys, source, tmp_path / "out.stablehlo")
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith("error: the exported model differs from its source by cls")
    assert err[0].endswith("nothing was written")
    assert os.listdir(tmp_path) == ["in.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}"], "the following arguments are required: target; --help"),
        (["{source}", "{folder}/x"], "format='' must be one of ('stablehlo', 'onnx', 'safetensors"),
        (["{source}", "{folder}/x.pb"], "format='pb' must be one of"),
        (["{source}", "{folder}/x", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["nowhere", "{folder}/x.stablehlo"], "'nowhere' must be a file or folder that exists"),
        (["{source}", "{folder}/y/x.stablehlo"], "y must be a folder; create it"),
        (["{source}", "{source}"], "is there already; --overwrite replaces it"),
        (
            ["{source}", "{folder}/x.stablehlo", "--size", "13x20"],
            "size=13x20 must be multiples of patch_size=4; choose 12x20",
        ),
        (["{source}", "{folder}/x.stablehlo", "--size", "0"], "size=0x0 must be multiples"),
        (["{source}", "{folder}/x.stablehlo", "--size", "large"], "argument --size: invalid"),
        (["{source}", "{folder}/x.safetensors", "--size", "12"], "a model of any image size"),
        (["{source}", "{folder}/x.stablehlo", "--num-heads", "5"], "num_heads=5 must divide"),
    ],
)
def test_wrong_input(arguments, message, source, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    names = dict(source=source, folder=tmp_path / "folder")
    code, out, err = run(capsys, *(text.format(**names) for text in arguments))
    assert (code, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert sorted(os.listdir(tmp_path)) == ["folder", "in.safetensors"]
    assert os.listdir(tmp_path / "folder") == []


def test_without_onnx(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, _, err = run(capsys, source, tmp_path / "out.onnx")
    assert code == 2
    assert err == [
        "error: ONNX export needs onnx, and onnxruntime for its check; "
        "pip install 'dinov2_jax[export]' or pip install onnx onnxruntime"
    ]
    assert os.listdir(tmp_path) == ["in.safetensors"]
