"""The run of lightly-train, with stand-ins for it and for torch: neither need be installed."""

import importlib
import json
import pathlib
import sys
import types

import pytest

from benchmarks import end_to_end
from tests.benchmarks.test_end_to_end import OPTIONS


class Method:
    """In place of lightly-train's DINOv2; counts its own hook's calls."""

    def __init__(self):
        self.trainer, self.num_calls = types.SimpleNamespace(global_step=0), 0
        model = types.SimpleNamespace(state_dict=lambda: {"step": self.trainer.global_step})
        wrapped = types.SimpleNamespace(get_model=lambda: model)
        self.teacher_embedding_model = types.SimpleNamespace(wrapped_model=wrapped)

    def on_train_batch_end(self, outputs, batch, batch_index):
        self.num_calls += 1


@pytest.fixture
def calls(monkeypatch):
    """Arguments of each call of `pretrain`."""
    calls = []
    method = type("DINOv2", (Method,), {})
    modules = {
        "lightly_train": dict(pretrain=lambda **arguments: calls.append(arguments)),
        "lightly_train._methods": {},
        "lightly_train._methods.dinov2": {},
        "lightly_train._methods.dinov2.dinov2": dict(DINOv2=method),
        "torch": dict(save=lambda tree, file: pathlib.Path(file).write_text(json.dumps(tree))),
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture
def lightly_run(calls, monkeypatch):
    monkeypatch.delitem(sys.modules, "benchmarks.lightly_run", raising=False)
    module = importlib.import_module("benchmarks.lightly_run")
    yield module
    sys.modules.pop("benchmarks.lightly_run")  # it holds the stand-ins


def test_arguments_of_the_benchmark_are_those_of_a_run(lightly_run, calls):
    *_, text = end_to_end.run_lightly(OPTIONS, "links", "workdir", 13)
    lightly_run.main(**json.loads(text))
    (arguments,) = calls
    assert arguments["out"] == "workdir/lightly" and arguments["data"] == "links"
    assert arguments["method"] == "dinov2" and arguments["model"] == "dinov2/vits14-notpretrained"
    assert arguments["trainer_args"] == {"max_steps": 13} and arguments["batch_size"] == 4
    assert not {"folder", "workdir", "steps", "snapshot_every"} & set(arguments)


def test_snapshots_are_kept_and_their_time_is_not_counted(lightly_run, monkeypatch, tmp_path):
    clock = [1000.0]
    monkeypatch.setattr(lightly_run, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    save = lightly_run.torch.save

    def slow_save(tree, file):
        save(tree, file)
        clock[0] += 100

    monkeypatch.setattr(lightly_run.torch, "save", slow_save)
    arguments = dict(folder="links", workdir=str(tmp_path / "run"), steps=5, batch_size=4)
    lightly_run.main(**arguments, snapshot_every=2)
    method = lightly_run.DINOv2()
    method.on_train_start()
    for step in range(1, 6):
        clock[0] += 3
        method.trainer.global_step = step
        method.on_train_batch_end("outputs", "batch", batch_index=step)
    assert method.num_calls == 5
    lines = (tmp_path / "run" / "snapshots.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["images"], row["seconds"]) for row in rows] == [(0, 0.0), (8, 6.0), (16, 12.0)]
    kept = [json.loads(pathlib.Path(row["file"]).read_text()) for row in rows]
    assert kept == [{"step": 0}, {"step": 2}, {"step": 4}]
