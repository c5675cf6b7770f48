"""The command: what it prints, and that wrong input is an error and nothing else."""

import os
import subprocess
import sys

import numpy as np
import pytest

from dinov2_jax.config import REPOSITORY
from dinov2_jax.convert import read_model
from dinov2_jax.convert.__main__ import main
from dinov2_jax.convert.safetensors_file import write_safetensors
from dinov2_jax.convert.write import write_model
from tests.convert.models import assert_same, make_params, make_spec


@pytest.fixture
def source(tmp_path):
    spec = make_spec("registers")
    params = make_params(spec, heads=("dino_head",))
    write_model(tmp_path / "in.safetensors", spec, params, format="safetensors")
    return tmp_path / "in.safetensors"


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_it_says_what_it_found_wrote_and_lost(source, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    code, out, err = run(capsys, source, target, "--format", "timm")
    assert (code, err) == (0, [])
    assert out[0] == f"{source}: safetensors, the reference's names, with prefixes"
    assert out[1].startswith("custom/4: 2 blocks of width 16, 2 heads, mlp 64, 4 registers")
    assert out[2] == "holds backbone, dino_head"
    assert out[3].startswith(f"wrote {target}: timm, 0.0 MB")
    assert out[4:] == [
        "lost: dino_head (the format has no place for them)",
        "lost: the mask token (timm has none)",
        "lost: the CLS position as a number of its own (timm adds it to the CLS token)",
    ]


def test_options(source, tmp_path, capsys):
    target = tmp_path / "out"
    arguments = ["--backbone-only", "--num-heads", 4, "--interpolation", "huggingface"]
    assert run(capsys, source, target, *arguments, "--pos-embed-grid", "2x5")[0] == 0
    spec, params = read_model(target, with_heads=True)
    assert (spec.num_heads, spec.pos_embed_grid, params.keys()) == (4, (2, 5), {"backbone"})
    _, before = read_model(source)
    del before["pos_embed"], params["backbone"]["pos_embed"]
    assert_same(params["backbone"], before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}"], "error: the following arguments are required: target; --help"),
        (["nowhere", "x"], "error: nowhere is not there; give a file or folder that exists"),
        (["{source}", "{source}"], "error: TARGET must not be SOURCE; choose another"),
        (["{source}", "{folder}"], "is there already; --overwrite replaces it"),
        (["{source}", "{folder}", "--overwrite"], "is a folder of something else than one model"),
        (["{source}", "{folder}/x", "--format", "gguf"], "invalid choice: 'gguf'"),
        (["{source}", "{folder}/x", "--num-heads", "5"], "num_heads=5 must divide the width 16"),
        (["{source}", "{folder}/x", "--pos-embed-grid", "16"], "argument --pos-embed-grid"),
        (["{source}", "{folder}/x", "--block-chunks", "2"], "block_chunks=2 needs format="),
        (["{folder}", "{folder}/x"], "must be a run's workdir, a checkpoint, or a folder"),
    ],
)
def test_wrong_input(arguments, message, source, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    names = dict(source=source, folder=tmp_path / "folder")
    code, _, err = run(capsys, *(text.format(**names) for text in arguments))
    assert code == 2
    assert message in "\n".join(err)
    assert sorted(os.listdir(tmp_path)) == ["folder", "in.safetensors"]
    assert os.listdir(tmp_path / "folder") == []


def test_everything_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path, capsys):
    write_safetensors(tmp_path / "x.safetensors", {"mask_token": np.zeros((1, 8))}, {})
    code, out, err = run(capsys, tmp_path / "x.safetensors", tmp_path / "out")
    assert (code, out) == (2, [])
    assert err[0].startswith("error: cannot read this state dict: ")
    assert "  cls_token is missing" in err[1:] or "  backbone.cls_token is missing" in err[1:]
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_in_a_process_of_its_own_without_torch_or_jax(source, tmp_path):
    """PyTorch, JAX and Orbax are not needed between two safetensors formats."""
    program = (
        "import sys; from dinov2_jax.convert.__main__ import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'jax', 'orbax'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, source, tmp_path / "o.safetensors"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    done = subprocess.run(
        [*command, "--format", "safetensors"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same(read_model(tmp_path / "o.safetensors")[1], read_model(source)[1])


def test_without_pytorch(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"")
    message = "error: PyTorch reads and writes .pth files, and is not installed; pip install torch"
    assert run(capsys, tmp_path / "x.pth", tmp_path / "o")[2] == [message]
    code, _, err = run(capsys, source, tmp_path / "o.pth", "--format", "reference")
    assert (code, err) == (2, [message])
    assert not (tmp_path / "o.pth").exists()
