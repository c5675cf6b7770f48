"""The command when something is wrong: bad numbers, bad images, bad input, a bad disk."""

import json
import os
import pathlib
import shutil
import signal

import fsspec
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from dinov2_jax import distributed, inputs, train
from dinov2_jax.data import files
from dinov2_jax.metrics import read_metrics
from tests.small_run import after_line, repeatable, run


class Tampered:
    """Batches of the pipeline, changed before the step gets them."""

    def __init__(self, batches, change):
        self._batches, self._change, self._step = batches, change, batches.step

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._batches.close()

    def __iter__(self):
        return self

    def __next__(self):
        batch = self._change(self._step, next(self._batches))
        self._step += 1
        return batch


def _tamper(monkeypatch, change):
    open_batches = inputs.open_batches
    monkeypatch.setattr(
        inputs,
        "open_batches",
        lambda *args, **kwargs: Tampered(open_batches(*args, **kwargs), change),
    )


def _nan_at(*steps):
    def change(step, batch):
        if step in steps:
            augment = np.zeros_like(batch.global_augment)
            augment[..., 0], augment[..., 1] = 1.0, np.nan  # jitter by a brightness of nan
            batch = batch._replace(global_augment=augment)
        return batch

    return change


def test_a_non_finite_step_is_skipped_counted_and_saved_for_replay(
    cache, tmp_path, monkeypatch, capsys
):
    _tamper(monkeypatch, _nan_at(4))
    assert run(tmp_path) == 0
    logs = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "total_loss" in line]
    counts = {line["step"]: line["nonfinite_steps"] for line in logs}
    assert counts == {1: 0, 2: 0, 4: 0, 6: 1, 8: 1, 10: 1, 12: 1}
    assert all(np.isfinite(line["total_loss"]) for line in logs)
    (path,) = (tmp_path / "nonfinite").iterdir()
    saved = json.loads(path.read_text())
    assert path.name == "step_5.json" and saved["index"] == [16, 17, 18, 19]
    assert "dino_global_loss" in saved["terms"]
    assert "step 5 was not finite in dino_global_loss" in capsys.readouterr().out


def test_too_many_non_finite_steps_stop_the_run_and_name_the_term(
    cache, tmp_path, monkeypatch, capsys
):
    _tamper(monkeypatch, _nan_at(5, 6, 7))
    assert run(tmp_path, guards__max_nonfinite_steps=2) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 steps were not finite" in error
    assert "dino_global_loss" in error and "guards.max_nonfinite_steps=2" in error
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4]


def test_collapse_is_reported_once_when_every_image_becomes_the_same(
    cache, tmp_path, monkeypatch, capsys
):
    def grey(step, batch):
        if step < 60:
            return batch
        return batch._replace(
            global_crops=np.full_like(batch.global_crops, 128),
            local_crops=np.full_like(batch.local_crops, 128),
            global_augment=np.zeros_like(batch.global_augment),
            local_augment=np.zeros_like(batch.local_augment),
        )

    _tamper(monkeypatch, grey)
    long = dict(total_steps=200, eval__kind="none", checkpoint_every_steps=0, teacher_every_steps=0)
    assert run(tmp_path, **long) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    warned = [line["step"] for line in lines if line["collapse_warning"]]
    assert len(warned) == 1 and warned[0] > 60
    out = capsys.readouterr().out
    assert out.count("warning: collapse at step") == 1 and "likely causes" in out


def _folder(path: pathlib.Path, *, good: int, bad: int) -> pathlib.Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(good):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path / f"good{i}.png")
    for i in range(bad):
        (path / f"bad{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    return path


def test_bad_images_are_counted_and_named_once(cache, tmp_path, monkeypatch, capsys):
    folder = _folder(tmp_path / "images", good=10, bad=2)
    (folder / "empty.png").write_bytes(b"")
    own = dict(data__path=folder, eval__kind="none", data__max_bad_fraction=0.5)
    assert run(tmp_path / "run", **own) == 0
    logs = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert logs[-1]["bad_images"] == 3
    assert [line["bad_images"] for line in logs] == sorted(line["bad_images"] for line in logs)
    named = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert len(named) == 3 and all("\t" in line for line in named)
    assert sum("bad0.png" in line for line in named) == 1
    assert "12 images" in capsys.readouterr().out.splitlines()[0]

    with monkeypatch.context() as patch:
        after_line(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(tmp_path / "resumed", **own) == 143
    assert run(tmp_path / "resumed", **own) == 0
    assert repeatable(tmp_path / "resumed") == repeatable(tmp_path / "run")
    assert (tmp_path / "resumed" / "bad_images.txt").read_text().splitlines() == named


def test_more_bad_images_than_allowed_stop_the_run(cache, tmp_path, capsys):
    folder = _folder(tmp_path / "images", good=10, bad=2)
    assert run(tmp_path / "run", data__path=folder, eval__kind="none") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data.max_bad_fraction=0.01" in error
    assert "of 12 images cannot be read" in error and "bad_images.txt" in error


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (dict(data__path="/nowhere"), "data.path: nothing found at '/nowhere'"),
        (
            dict(data__path="", data__mixture="(('/no', 1),)"),
            "data.mixture: nothing found at '/no'",
        ),
        (dict(eval__bank_path="/nowhere"), "eval.bank_path: nothing found at '/nowhere'"),
        (dict(eval__query_path="/nowhere"), "eval.query_path: nothing found at '/nowhere'"),
        (dict(total_step=3), "did you mean total_steps?"),
        (dict(crops__global_crop_size_px=20), "use 16 or 24"),
        (dict(mesh__data=9), "needs 9 devices"),
        (dict(mesh__data=8), "nearest that fit"),
        (dict(attention="cudnn"), "needs a GPU"),
        (dict(masks__mask_probability=0), "or set ibot.loss_weight=0"),
        (dict(profile_steps="9:9"), "first < last"),
        (dict(seed=10**23), "must be at most"),
        (dict(eval__bank_path="photos:right"), "every query would find itself"),
        (dict(eval__num_neighbors=1000), "eval.num_neighbors"),
        (dict(wandb_project="x"), "pip install 'dinov2_jax[wandb]'"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(tmp_path, capsys, overrides, complaint):
    assert run(tmp_path / "run", **overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_a_store_that_does_not_answer_is_one_line_and_code_1(tmp_path, monkeypatch, capsys):
    """Code 1 is restarted, see launch/jobset.yaml."""

    def reset(self, path, **kwargs):
        raise ConnectionError("reset")

    monkeypatch.setattr(files, "PAUSES_SECS", ())
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", reset)
    assert run(tmp_path / "run", data__path="memory://images", eval__kind="none") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: data.path: memory://images cannot be read (Conn")
    assert error.count("\n") == 1 and "run the same command again" in error


def test_a_checkpoint_that_cannot_be_read_now_is_code_1_and_stays(
    finished, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    before = sorted(path.name for path in (workdir / "checkpoints").iterdir())

    def fail(self, *_, **__):
        raise ValueError(
            "ABORTED: All 32 retry attempts failed: Unknown [http_response_code='503']"
        )

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
    assert run(workdir) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: checkpoint 8 in" in error and "503" in error
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before
    assert "8" in before and not (workdir / "checkpoints_unreadable").exists()


def test_dry_run_prints_the_table_and_writes_nothing(tmp_path, capsys):
    assert run(tmp_path / "run", "--dry_run", pictures="true") == 0
    out = capsys.readouterr().out
    for word in ("19 images", "mesh", "backbone", "images a device", "learning rate", "memory"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_an_unwritable_workdir_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be written" in error and str(tmp_path) in error


def test_a_workdir_in_use_is_refused(tmp_path, capsys):
    with train.open_workdir(tmp_path):
        assert run(tmp_path) == 2
    assert "in use by another run" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_loses_nothing_saved(finished, tmp_path, monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        after_line(patch, 6, full)
        assert run(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no space left" in error and "Traceback" not in error
    assert run(tmp_path) == 0
    assert repeatable(tmp_path) == repeatable(finished)


def test_hosts_must_agree_on_the_unreadable_images_too(tmp_path, monkeypatch, capsys):
    """Hosts that each lack another image have as many, under other numbers."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(5):
        Image.new("RGB", (20, 20)).save(photos / f"{i}.png")
    (photos / "2.png").write_bytes(b"")

    def check_same(what, text):
        if what == "set of images":
            assert text.startswith("4 but for") and "2.png" in text
            raise distributed.HostError("another set of images")

    monkeypatch.setattr(distributed, "check_same", check_same)
    assert run(tmp_path / "run", data__path=photos, eval__kind="none") == 2
    assert "another set of images" in capsys.readouterr().err
