"""The command: what it says, its exit codes, and that kill -9 costs a shard at most."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from dinov2_jax.config import REPOSITORY
from dinov2_jax.features import read
from dinov2_jax.features.__main__ import main
from tests.features.conftest import NUM_IMAGES
from tests.features.test_extract import contents

FLAGS = ["--shard-size=4", "--batch-size=1", "--max-bad-fraction=0.1"]
# Ends itself as kill -9 would, when shard 2 is about to be put in its place.
KILLED = """
import os, signal, sys
from dinov2_jax.features import __main__, folder_store
rename = os.rename
def rename_or_die(a, b):
    if b.name.startswith("shard-00002"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
folder_store.os.rename = rename_or_die
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.fixture
def arguments(cache, model_path, photos):
    return [str(photos), "--model", str(model_path), *FLAGS]


def test_killed_and_run_again_is_the_run_that_was_left_alone(arguments, cache, tmp_path, capsys):
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    out, whole = str(tmp_path / "out"), str(tmp_path / "whole")
    assert main([*arguments, whole]) == 0
    said = capsys.readouterr().out
    assert f"{NUM_IMAGES} images in 2 classes from folder" in said
    assert "custom/4: 3 blocks of width 16" in said
    assert "cls as float32: 64 bytes an image" in said
    assert "03.jpg: " in said and "11.jpg: " in said
    assert "20 images, 2 of them bad; " in said and "of the time waiting for data" in said
    assert "whole is complete" in said

    command = [sys.executable, "-c", KILLED, *arguments, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert ".part-0-of-1" in left and "shard-00002-of-00005" not in left
    with pytest.raises(ValueError, match="2 of 5 shards are there"):
        read(out)
    assert main([*arguments, out]) == 0
    assert "8 of 20 images are done: going on" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    # Once more: nothing to do. Otherwise: refused, and nothing changed.
    assert main([*arguments, out]) == 0
    said = capsys.readouterr().out
    assert "20 of 20 images are done" in said and "images/s" not in said
    assert main([*arguments, out, "--what=cls,mean"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "what: 'cls' -> 'cls,mean'" in error
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_processes_that_find_each_other_share_the_work(arguments, cache, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    out, whole = tmp_path / "out", tmp_path / "whole"

    def start(index: int) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "dinov2_jax.features", *arguments, str(out)]
        return subprocess.Popen(
            [*command, "--distributed=on"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    processes = [start(index) for index in (0, 1)]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    # Shards 0, 2 and 4 of 4 images each are the first one's.
    for text, images in zip(said, (12, 8), strict=True):
        assert f"{images} images, " in text, said
    assert "images in 2 classes" in said[0] and "images in 2 classes" not in said[1]
    assert any("out is complete" in text for text in said)
    assert main([*arguments, str(whole)]) == 0
    assert contents(out) == contents(whole)


def test_options_reach_the_work(arguments, tmp_path):
    out = tmp_path / "out.npz"
    flags = "--what=layers=2 --dtype=float16 --no-norm --resize=24 --crop=16 --tree=teacher"
    assert main([*arguments, str(out), *flags.split(), "--interpolation=reference"]) == 0
    index = read(out).index
    assert index["what"] == "layers=1+2" and index["norm"] is False
    assert index["arrays"]["layers_cls"] == {"dtype": "float16", "shape": [2, 16]}
    assert index["resize_size_px"] == 24 and index["image_shape"] == [16, 16, 3]
    assert index["model"]["name"].endswith("model.safetensors")
    assert main([*arguments, str(out), *flags.split(), "--compute-dtype=bfloat16"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--what=clss"], "'clss' must be one of"),
        (["--no-such-flag"], "unrecognized arguments"),
        (["--model=nowhere"], "'nowhere' must be a file or folder that exists"),
        (["--batch-size=0"], "per_device_batch_size=0 must be at least 1"),
        (["--distributed=on"], "nothing says where the other processes are"),
        (["--distributed=on", "--process-index=0"], "leave --process-.. out"),
    ],
)
def test_wrong_input_is_one_line(arguments, tmp_path, capsys, change, message):
    assert main([*arguments, str(tmp_path / "out"), *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_devices", "flags", "expected"),
    [(1, [], "by_head"), (1, ["--attention=xla"], "xla"), (8, [], "xla")],
)
def test_attention_is_that_of_frozen_models(
    arguments, tmp_path, monkeypatch, num_devices, flags, expected
):
    from dinov2_jax.features import __main__

    models = []

    def keep(model, *_, **__):
        models.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "extract", keep)
    monkeypatch.setattr(jax, "device_count", lambda: num_devices)
    assert main([*arguments, str(tmp_path / "out"), *flags]) == 130
    assert models[0]._module.attention == expected


def test_a_full_disk_and_ctrl_c(arguments, tmp_path, capsys, monkeypatch):
    from dinov2_jax.features import __main__

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "extract", full)
    assert main([*arguments, str(tmp_path / "out")]) == 1
    assert "free space, and the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(__main__, "extract", interrupted)
    assert main([*arguments, str(tmp_path / "out")]) == 130
    assert "the same command goes on" in capsys.readouterr().err
