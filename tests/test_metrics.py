"""metrics.jsonl: whole lines, cut back on resume, and what a workdir tells about its origins."""

import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from dinov2_jax import metrics
from dinov2_jax.config import REPOSITORY
from dinov2_jax.metrics import (
    METRICS_FILE,
    MetricsWriter,
    add_environment,
    describe_environment,
    git_revision,
    read_metrics,
)


def _write(workdir, restored_step, lines, **options):
    with MetricsWriter(workdir, restored_step=restored_step, **options) as writer:
        for step, value in lines:
            writer.write(step, {"total_loss": value})


def test_numbers_round_trip_and_non_finite_ones_are_null(tmp_path):
    value = np.float32(0.1)
    with MetricsWriter(tmp_path, restored_step=None) as writer:
        writer.write(1, {"a": value, "b": float("nan"), "c": np.float32("inf"), "d": np.int32(3)})
        # On disk before the file is closed: a killed process loses no line.
        (line,) = read_metrics(tmp_path / METRICS_FILE)
    assert line == {"step": 1, "a": float(value), "b": None, "c": None, "d": 3}
    assert np.float32(line["a"]) == value


def test_resume_cuts_back_to_the_restored_step_and_drops_half_a_line(tmp_path):
    _write(tmp_path, None, [(0, 1.0), (5, 2.0), (10, 3.0), (15, 4.0)])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 2, "total_l')
    _write(tmp_path, 10, [(15, 5.0)])
    lines = read_metrics(tmp_path / METRICS_FILE)
    assert [(line["step"], line["total_loss"]) for line in lines] == [
        (0, 1.0),
        (5, 2.0),
        (10, 3.0),
        (15, 5.0),
    ]


def test_a_complete_last_line_without_its_newline_is_half_a_line(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"step": 2}')
    _write(tmp_path, 5, [])
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1}]


def test_a_line_cut_in_the_middle_of_the_file_is_dropped(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    _write(tmp_path, 5, [])
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1}, {"step": 2}]


def test_a_new_run_starts_an_empty_file(tmp_path):
    _write(tmp_path, None, [(1, 1.0)])
    _write(tmp_path, None, [(2, 2.0)])
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [2]


def test_tensorboard_gets_the_same_numbers_and_a_purge_mark(tmp_path):
    _write(tmp_path, None, [(1, 1.0), (2, float("nan"))], tensorboard=True)
    _write(tmp_path, 1, [(2, 3.0)], tensorboard=True)
    data = b"".join(path.read_bytes() for path in sorted((tmp_path / "tensorboard").iterdir()))
    assert data.count(b"total_loss") == 2


def test_tensorboard_has_every_event_at_a_flush(tmp_path):
    with MetricsWriter(tmp_path, restored_step=None, tensorboard=True) as writer:
        for step in range(200):
            writer.write(step, {"total_loss": 1.0})
        writer.flush()
        (events,) = (tmp_path / "tensorboard").iterdir()
        assert events.read_bytes().count(b"total_loss") == 200


def test_wandb_without_the_package_names_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'dinov2_jax\[wandb\]'"):
        MetricsWriter(tmp_path, restored_step=None, wandb_project="p")


class _Wandb:
    """As much of wandb as the writer uses."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        run = types.SimpleNamespace(id=settings["id"] or f"run{len(self.started)}")
        run.log = lambda values, *, step: self.logged.append((step, values))
        run.finish = lambda: setattr(self, "finished", self.finished + 1)
        return run


def test_wandb_gets_the_finite_numbers_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = dict(wandb_project="p", config={"seed": 3})
    _write(tmp_path, None, [(1, 1.0), (2, float("nan"))], **settings)
    _write(tmp_path, 1, [(2, 2.0)], **settings)
    assert [start["id"] for start in wandb.started] == [None, "run1"]
    for start in wandb.started:
        assert start == dict(project="p", id=start["id"], resume="allow", config={"seed": 3})
    assert wandb.logged == [(1, {"total_loss": 1.0}), (2, {}), (2, {"total_loss": 2.0})]
    assert wandb.finished == 2


def test_environment_has_versions_devices_command_and_revision(tmp_path):
    environment = describe_environment(jax.devices(), repository=REPOSITORY)
    for _ in range(2):
        add_environment(tmp_path, environment)
    starts = json.loads((tmp_path / "environment.json").read_text())["starts"]
    assert starts == [environment, environment]
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["num_devices"] == 8 and environment["command"][0] == sys.executable


def test_git_revision_knows_clean_from_dirty_and_absent(tmp_path):
    assert git_revision(tmp_path) is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, timeout=30)

    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    clean = git_revision(tmp_path)
    assert len(clean["revision"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("b")
    assert git_revision(tmp_path) == {**clean, "dirty": True}


def test_an_evaluation_that_the_restored_state_does_not_know_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ({"step": 2}, {"step": 2, "eval_secs": 1}, {"step": 4}, {"step": 4, "eval_secs": 1})
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + b"\xff\xfe\n")
    kept = [json.loads(line) for line in metrics.kept_lines(path, 4, evaluated_step=2)]
    assert kept == [*lines[:3]]
    assert len(metrics.kept_lines(path, 4)) == 4
