"""Two processes of four devices are one run: the same numbers, one voice, one decision to stop."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from dinov2_jax.config import REPOSITORY
from dinov2_jax.metrics import read_metrics
from tests.small_run import arguments, repeatable, run

LAUNCHER = REPOSITORY / "launch" / "local_multiprocess.sh"
# LayerScale 1: at 1e-5 all class tokens nearly coincide, and KoLeo is ill-conditioned.
SETTINGS = dict(global_batch_size=16, group_size=2, mesh__data=-1, model__layer_scale_init=1.0)


def launch(workdir: epath.PathLike, cache: pathlib.Path, *extra: str, path="", **overrides):
    """Starts the script with two processes of four devices; `path` is imported from first."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(path), str(REPOSITORY)])),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [str(LAUNCHER), "2", "4", "--", *arguments(workdir, *extra, **SETTINGS | overrides)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_close(ours: list[dict], theirs: list[dict], rtol: float):
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=rtol, abs=1e-6), a["step"]


@pytest.fixture(scope="module")
def two(cache, tmp_path_factory):
    """The workdir of an uninterrupted run of two processes, and what it printed."""
    workdir = tmp_path_factory.mktemp("two")
    process = launch(workdir, cache, pictures="true")
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return workdir, output


@pytest.mark.parametrize("devices", [8, 1])
def test_two_processes_equal_one(two, cache, tmp_path, devices):
    """Every metric of every step, stochastic depth on: the order of sums is all that differs."""
    assert run(tmp_path, **SETTINGS | dict(mesh__data=devices)) == 0
    assert_close(repeatable(two[0]), repeatable(tmp_path), rtol=1e-5)


def test_one_process_speaks_and_writes(two):
    workdir, output = two
    assert output.count("images in 19 classes") == output.count("compiled the step") == 1
    assert re.search("mesh +data 8 x fsdp 1 x model 1, of 8 x cpu", output)
    steps = [line["step"] for line in read_metrics(workdir / "metrics.jsonl")]
    assert steps == sorted(steps) and len(steps) == len(set(steps)) + 3  # evaluations, at 4, 8, 12
    for name in ("teacher.safetensors", "crops.png", "pca.png", "model.json"):
        assert (workdir / name).exists()


def children(pid: int) -> list[int]:
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")  # a thread may have started them
    return sorted(int(child) for path in tasks for child in path.read_text().split())


def descendants(pid: int) -> list[int]:
    return [pid for child in children(pid) for pid in (child, *descendants(child))]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_signal_to_one_host_stops_both_and_any_number_goes_on(two, cache, tmp_path):
    """All that runs on it gets the signal, the data workers too, whose batches are still needed."""
    cut = dict(mesh__fsdp=8, mesh__min_size_to_shard_mb=0)  # each host holds half of every leaf
    process = launch(tmp_path, cache, loader__num_workers=1, loader__prefetch_batches=1, **cut)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    _, host = children(process.pid)  # not the one that writes
    workers = descendants(host)
    assert workers
    for pid in (*workers, host):
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 143, output
    assert "stopped and saved after step" in output
    # One process goes on with what two have saved.
    assert run(tmp_path, **SETTINGS) == 0
    assert_close(repeatable(tmp_path), repeatable(two[0]), rtol=1e-5)


NOTICED_ALONE = """
import os, sys, threading, time
process = os.environ.get("JAX_PROCESS_ID")
if process:
    from dinov2_jax import preemption
    from dinov2_jax.loop import Loop

    def note(name, text):
        with open(os.path.join({folder!r}, name + process), "a") as file:
            file.write(text + " ")

    save, leave = Loop.save, sys.exit
    def note_and_save(self):
        note("saved", str(self.step))
        save(self)
    def note_and_leave(code):
        note("code", str(code))
        leave(code)
    Loop.save, sys.exit = note_and_save, note_and_leave
if process == "1":
    preempted, one_step = threading.Event(), Loop._one_step
    def preempt(self):
        if self.step == 5:
            preempted.set()
            while self.exchange.signals.received is None: time.sleep(0.01)
        one_step(self)
    Loop._one_step = preempt
    preemption.EVERY_SECS = 0.01
    preemption.asker = lambda: lambda: "the cloud takes this back" if preempted.is_set() else None
"""


def test_a_clouds_notice_to_one_host_stops_both_at_the_same_step(two, cache, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NOTICED_ALONE.format(folder=str(tmp_path)))
    workdir = tmp_path / "run"
    cut = dict(mesh__fsdp=8, mesh__min_size_to_shard_mb=0)  # each host holds half of every leaf
    process = launch(workdir, cache, path=tmp_path, **cut)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 143, output
    assert output.count("the cloud takes this back: stopping where nothing is lost") == 1
    assert "stopped and saved after step" in output
    said = {path.name: path.read_text().split() for path in tmp_path.glob("*[01]")}
    assert said["code0"] == said["code1"] == ["143"]
    assert said["saved0"] == said["saved1"] and int(said["saved0"][-1]) in (
        6,
        7,
    )  # not 8, due anyway
    assert run(workdir, **SETTINGS) == 0
    assert_close(repeatable(workdir), repeatable(two[0]), rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_two_hosts_that_share_but_a_bucket_are_killed_and_go_on(two, cache, any_bucket, tmp_path):
    """Each writes its part of every checkpoint to the store; no leaf is whole on one of them."""
    workdir = epath.Path(any_bucket) / tmp_path.name / "run"
    cut = dict(mesh__fsdp=8, mesh__min_size_to_shard_mb=0)
    process = launch(workdir, cache, **cut)
    deadline = time.monotonic() + 400
    while not (workdir / "checkpoints" / "8" / "state").exists():  # being written, or just written
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    for pid in (process.pid, *descendants(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    process = launch(workdir, cache, **cut)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert re.search("resumed from step [48]\n", output)
    assert_close(repeatable(workdir), repeatable(two[0]), rtol=1e-5)
    assert (workdir / "teacher.safetensors").exists()


def test_two_processes_go_on_with_a_run_of_one(two, cache, tmp_path, monkeypatch):
    from dinov2_jax import loop

    class Killed(Exception):
        pass

    save = loop.Loop.save

    def save_and_die(self):
        save(self)
        self.checkpoints.wait()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "save", save_and_die)
        with pytest.raises(Killed):
            run(tmp_path, **SETTINGS)
    # Cut over both hosts, prototypes too; the last step's evaluation and teacher gather it.
    cut = dict(mesh__fsdp=4, mesh__model=2, mesh__min_size_to_shard_mb=0)
    process = launch(tmp_path, cache, **cut)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert "resumed from step 4" in output
    assert re.search("mesh +data 1 x fsdp 4 x model 2, of 8 x cpu", output)
    assert (tmp_path / "teacher.safetensors").exists()
    assert_close(repeatable(tmp_path), repeatable(two[0]), rtol=1e-5)


def test_numbers_that_are_not_finite_on_one_host_stop_both_at_the_same_step(two, cache, tmp_path):
    """The loss is of all hosts' images: both see it, and count alike."""
    (tmp_path / "sitecustomize.py").write_text(
        FAILS_ALONE + "    from dinov2_jax import inputs\n"
        "    from tests.test_train_faults import Tampered, _nan_at\n"
        "    open_batches, change = inputs.open_batches, _nan_at(4, 5)\n"
        "    inputs.open_batches = lambda *args, **kwargs: Tampered(\n"
        "        open_batches(*args, **kwargs), change)\n"
    )
    workdir = tmp_path / "run"
    process = launch(
        workdir, cache, path=tmp_path, eval__kind="none", guards__max_nonfinite_steps=1
    )
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in output, output
    for number in (0, 1):  # each says it for itself
        assert output.count(f"error: process {number}: 2 steps were not finite") == 1
    assert output.count("step 5 was not finite in dino_global_loss") == 1
    saved = [json.loads(path.read_text()) for path in (workdir / "nonfinite").iterdir()]
    assert sorted(x["step"] for x in saved) == [5, 6]
    assert all(len(x["index"]) == 16 for x in saved)  # of the global batch, for a replay


FAILS_ALONE = """
import os
if os.environ.get("JAX_PROCESS_ID") == "1":
"""
IN_A_STEP = """
    from dinov2_jax.loop import Loop
    one_step = Loop._one_step
    def fail(self):
        if self.step == 4: raise ZeroDivisionError("only here")
        one_step(self)
    Loop._one_step = fail
"""
IN_A_WRITE = """
    import orbax.checkpoint as ocp
    async_save = ocp.StandardCheckpointHandler.async_save
    class Fails:
        def result(self, timeout): raise OSError(28, "full")
    async def fail(*args, **kwargs):
        return [*await async_save(*args, **kwargs), Fails()]
    ocp.StandardCheckpointHandler.async_save = fail
"""


@pytest.mark.parametrize(
    "patch, error",
    [
        (IN_A_STEP, "ZeroDivisionError: only here"),
        (IN_A_WRITE, "no space left for --workdir="),
    ],
    ids=["step", "background write"],
)
def test_a_process_that_fails_alone_in_mid_run_ends_the_other_in_one_line(
    two, cache, tmp_path, patch, error
):
    """The script ends nobody before one has ended: a process that nobody tells waits for ever."""
    (tmp_path / "sitecustomize.py").write_text(FAILS_ALONE + patch)
    process = launch(tmp_path / "run", cache, path=tmp_path, eval__kind="none")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    assert output.count("Traceback") == output.count(f"\n{error}") == (patch == IN_A_STEP), output
    assert f"error: process 0: process 1 failed: {error}" in output
    # What was on its way is whole, or not there.
    whole = (tmp_path / "run" / "checkpoints" / "4" / "_CHECKPOINT_METADATA").exists()
    assert whole == (patch == IN_A_STEP)
