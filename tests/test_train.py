"""The command: a shipped recipe end to end, every way to stop it, and what comes after."""

import json
import os
import pathlib
import signal
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dinov2_jax import config as config_lib
from dinov2_jax import inputs, train
from dinov2_jax.convert import ModelSpec, read_model
from dinov2_jax.convert.safetensors_file import read_safetensors
from dinov2_jax.convert.spec import METADATA_KEY
from dinov2_jax.convert.state_dict import to_reference
from dinov2_jax.flags import parse_flags
from dinov2_jax.metrics import read_metrics
from tests.small_run import after_line, arguments, repeatable, run, start, written_config


class Tracked:
    """A configuration that remembers which keys were read."""

    def __init__(self, config: ConfigDict, read: set[str], prefix: str = ""):
        self._config, self._read, self._prefix = config, read, prefix

    def __getattr__(self, name: str):
        value = getattr(self._config, name)
        if callable(value):
            return value
        if isinstance(value, ConfigDict):
            return Tracked(value, self._read, f"{self._prefix}{name}.")
        self._read.add(f"{self._prefix}{name}")
        return value

    __getitem__ = __getattr__


def test_a_run_leaves_a_workdir_that_explains_itself_and_no_key_is_unread(
    cache, tmp_path, monkeypatch, capsys
):
    read: set[str] = set()
    load = config_lib.load_config
    tracked = lambda *args: Tracked(load(*args), read)  # noqa: E731
    monkeypatch.setattr(config_lib, "load_config", tracked)
    assert run(tmp_path, pictures="true", tensorboard="true", profile_steps="2:4") == 0
    out = capsys.readouterr().out.splitlines()

    assert out[0].startswith("19 images in 19 classes from the installed wheels photos:left")
    assert any("learning rate" in line and "0.001" in line for line in out)
    assert not [line for line in out if "warning: profile_steps" in line]
    # Twelve steps are too few for the quickstart's momentum: said once, before the long wait.
    (warned,) = [n for n, line in enumerate(out) if "warning: teacher.momentum_start" in line]
    assert warned < next(n for n, line in enumerate(out) if "compiled the step" in line)
    assert "--config.data.path=/your/images" in out[-1] and str(tmp_path) in out[-1]
    assert "random initialisation" in out[-2]
    for name in ("crops.png", "pca.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 100
    assert list((tmp_path / "tensorboard").iterdir())
    assert_is_trace_of(tmp_path / "profile", steps=[2, 3])
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 12]
    assert written_config(tmp_path)["total_steps"] == 12
    start_entry = json.loads((tmp_path / "environment.json").read_text())["starts"][0]
    assert start_entry["packages"]["jax"] == jax.__version__
    assert not (tmp_path / "bad_images.txt").exists()

    weights, metadata = read_safetensors(tmp_path / "teacher.safetensors")
    assert metadata["step"] == "12" and json.loads(metadata["config"])["total_steps"] == 12
    assert weights["backbone.blocks.1.attn.qkv.weight"].shape == (48, 16)
    assert weights["ibot_head.last_layer.weight_v"].shape == (16, 8)

    # The run says what it trained: the newest checkpoint and the file are the same model.
    spec, params = read_model(tmp_path, with_heads=True)
    assert (spec.num_heads, spec.crop_size_px, spec.embed_dim) == (2, 16, 16)
    assert ModelSpec.from_json(metadata[METADATA_KEY]) == spec
    named = to_reference(params)
    assert named.keys() == weights.keys()
    for name, array in named.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)

    # Keys that only other recipes read.
    config = Tracked(load(*_quickstart(eval__kind="knn", data__path="photos:")), read)
    trainer = train.startup.build_trainer(config, train.startup.build_mesh(config))
    inputs.build_evaluation(config, trainer)
    unread = set(config_lib.flatten_config(config._config)) - read
    assert unread == set()


# What docs/metrics.md promises of a trace; what jax differentiates it names so.
STAGES = ("augment", "teacher", "targets/sinkhorn_knopp", "student", "optimizer", "ema")
TEACHER_PARTS = tuple(
    f"teacher/{part}" for part in ("VisionTransformer/backbone", "DINOHead", "DINOHead/prototypes")
)
STUDENT_PARTS = tuple(
    f"student/{part}"
    for part in (
        "jvp(VisionTransformer)/backbone",
        "transpose(jvp(VisionTransformer))/backbone",
        "jvp(DINOHead.bottleneck)",
        "jvp(prototypes)",
    )
)


def assert_is_trace_of(folder: pathlib.Path, steps: list[int]):
    """That xprof can read the trace, which has these steps and the scopes of their program."""
    (file,) = folder.glob("plugins/profile/steps_2_4/*.xplane.pb")  # where xprof looks
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes}
    events = [event for line in planes["/host:CPU"].lines for event in line.events]
    found = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert found == steps
    for scope in (*STAGES, *TEACHER_PARTS, *STUDENT_PARTS):
        assert f"jit(train_step)/{scope}/".encode() in file.read_bytes(), scope


def _quickstart(**overrides):
    flags = parse_flags(arguments(pathlib.Path("unused"), **overrides))
    return flags.config, flags.overrides


def test_metrics_have_every_name_and_add_up(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    logs = [line for line in lines if "total_loss" in line]
    evals = [line for line in lines if "knn/photos/cls" in line]
    assert [line["step"] for line in logs] == [1, 2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in evals] == [0, 4, 8, 12]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    names = """step total_loss dino_global_loss dino_local_loss ibot_loss koleo_loss
        dino_ce_over_log_k ibot_ce_over_log_k teacher_entropy student_entropy prototypes_in_use
        feature_std feature_rank grad_norm/backbone grad_norm/dino_head grad_norm/ibot_head
        learning_rate last_layer_learning_rate weight_decay teacher_momentum teacher_temp
        images_per_sec images_per_sec_per_chip tflops_per_chip step_secs data_wait_share goodput
        secs/init secs/compile secs/step secs/data_wait secs/checkpoint secs/evaluate secs/lost
        bad_images nonfinite_steps collapse_warning"""
    config = written_config(finished)
    for line in logs:
        assert set(line) == set(names.split())
        weighted = (
            config["dino"]["loss_weight"] * (line["dino_global_loss"] + line["dino_local_loss"])
            + config["ibot"]["loss_weight"] * line["ibot_loss"]
            + config["koleo"]["loss_weight"] * line["koleo_loss"]
        )
        assert line["total_loss"] == pytest.approx(weighted, rel=1e-6)
        assert line["images_per_sec"] > 0 and 0 <= line["data_wait_share"] <= 1
        assert (line["collapse_warning"], line["nonfinite_steps"], line["bad_images"]) == (0, 0, 0)
    explained = (config_lib.REPOSITORY / "docs" / "metrics.md").read_text()
    mfus = {"model_mfu", "executed_mfu"}  # there are none on a CPU
    assert not [name for name in {*names.split(), *mfus} - {"step"} if f"`{name}`" not in explained]
    baselines = {"chance", "raw_pixels", "color_stats", "random_init_cls"}
    assert {f"knn/photos/{name}" for name in baselines} <= set(evals[0])
    assert logs[-1]["total_loss"] < logs[0]["total_loss"]


def test_the_last_checkpoint_comes_last_and_no_picture_is_worth_a_run(
    cache, tmp_path, monkeypatch, capsys
):
    saved = []

    def draw(*_):
        saved.extend(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert read_safetensors(tmp_path / "teacher.safetensors")[1]["step"] == "12"
        raise RuntimeError("out of paint")

    monkeypatch.setattr(inputs, "draw_patches", draw)
    assert run(tmp_path, pictures="true") == 0
    assert saved and not [name for name in saved if name.startswith("12")]
    assert (tmp_path / "checkpoints" / "12").is_dir()
    assert "warning: pca.png could not be drawn (out of paint)" in capsys.readouterr().out


def test_a_finished_run_says_so(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert run(finished) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("number", "code", "step"),
    # Step 6 lies between checkpoints; at step 4 an evaluation and a checkpoint are due.
    [(signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 4)],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    finished, tmp_path, monkeypatch, capsys, number, code, step
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        after_line(patch, step, lambda: os.kill(os.getpid(), number))
        assert run(tmp_path) == code
    assert "stopped and saved after step" in capsys.readouterr().out
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert step <= saved <= step + 2
    assert signal.getsignal(number) == before
    assert run(tmp_path, log_every_steps=2, loader__num_threads=1, profile_steps="2:4") == 0
    out = capsys.readouterr().out
    assert f"resumed from step {saved}" in out
    assert f"warning: profile_steps=2:4 begins before step {saved}," in out
    assert not (tmp_path / "profile").exists()
    assert repeatable(tmp_path) == repeatable(finished)
    ours, theirs = (read_safetensors(w / "teacher.safetensors")[0] for w in (tmp_path, finished))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def _wait_for(condition, process, secs=120):
    deadline = time.monotonic() + secs
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_at_any_moment_and_during_a_save_repeats_every_number(finished, cache, tmp_path):
    """SIGKILL three times in one run; each time the same command goes on."""
    metrics, checkpoints = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"

    def line_of(step):
        return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()

    def saving():
        return any("tmp" in path.name for path in checkpoints.glob("*"))

    rng = np.random.default_rng(0)
    for condition, delay in (
        (line_of(2), 0.0),
        (saving, 0.0),
        (lambda: (checkpoints / "4").exists(), rng.uniform(0.0, 0.05)),
    ):
        process = start(tmp_path, cache)
        try:
            _wait_for(condition, process)
            time.sleep(delay)
        finally:
            process.kill()
            process.communicate()
    process = start(tmp_path, cache)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "resumed from step" in output
    assert repeatable(tmp_path) == repeatable(finished)
    assert not [path for path in checkpoints.iterdir() if "tmp" in path.name]


def test_a_result_changing_key_is_refused_with_a_diff_unless_told_otherwise(
    finished, tmp_path, monkeypatch, capsys
):
    before = (finished / "config.json").read_text()
    assert run(finished, total_steps=14, optim__clip_norm=1.0) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "optim.clip_norm: 3.0 -> 1.0" in error and "total_steps: 12 -> 14" in error
    assert "--allow_config_change" in error
    assert (finished / "config.json").read_text() == before

    with monkeypatch.context() as patch:
        after_line(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(tmp_path) == 143
    assert run(tmp_path, "--allow_config_change", optim__min_learning_rate=2e-6) == 0
    assert "configuration changed: optim.min_learning_rate" in capsys.readouterr().out
    assert written_config(tmp_path)["optim"]["min_learning_rate"] == 2e-6

    # A model that the checkpoint does not fit is not the run's: its configuration stays.
    before = (tmp_path / "config.json").read_text()
    changes = dict(total_steps=14, model__depth=1)
    assert run(tmp_path, "--allow_config_change", **changes) == 2
    assert "set its keys back" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == before
