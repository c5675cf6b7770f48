"""Checkpoints: exact, kept by policy, onto any mesh, and whole whenever the process dies."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dinov2_jax.checkpoints import Checkpoints, KeepPolicy, abstract_like
from dinov2_jax.config import REPOSITORY
from dinov2_jax.faults import PassingFault
from dinov2_jax.sharding import make_mesh


def _state(value: float):
    return {
        "w": jnp.full((64, 32), value, jnp.float32),
        "n": jnp.asarray(int(value), jnp.int32),
        "opt": (jnp.full((8,), -value),),
    }


def _abstract(mesh=None):
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    state = _state(0)
    replicated = NamedSharding(mesh, PartitionSpec())
    return abstract_like(state, jax.tree.map(lambda _: replicated, state))


def _fail(text):
    raise AssertionError(text)


def test_round_trip_is_exact_and_donation_after_save_is_safe(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"w": jax.random.normal(jax.random.key(0), (512, 512)), "n": jnp.zeros((), jnp.int32)}
    expected = {}
    mesh = make_mesh(devices=jax.devices()[:1])
    sharding = NamedSharding(mesh, PartitionSpec())
    abstract = abstract_like(state, jax.tree.map(lambda _: sharding, state))
    with Checkpoints(tmp_path, KeepPolicy(last=10)) as checkpoints:
        for number in range(1, 6):
            state = step(state)
            expected[number] = jax.tree.map(np.array, state)  # a copy, before the donation
            checkpoints.save(number, state, {"number": number})
            state = step(state)
        checkpoints.wait()
        number, restored, host = checkpoints.restore_latest(abstract, warn=_fail)
    assert (number, host) == (5, {"number": 5})
    jax.tree.map(np.testing.assert_array_equal, restored, expected[5])


def test_a_relative_directory_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default workdir is relative: runs/<config>
    with Checkpoints("runs/x", KeepPolicy(last=1)) as checkpoints:
        checkpoints.save(3, _state(3), {})
        checkpoints.wait()
    assert (tmp_path / "runs" / "x" / "3").is_dir()
    with Checkpoints("runs/x", KeepPolicy(last=1)) as checkpoints:
        number, restored, _ = checkpoints.restore_latest(_abstract(), warn=_fail)
    assert number == 3
    jax.tree.map(np.testing.assert_array_equal, restored, _state(3))


def test_keeps_the_last_every_so_many_and_the_best(tmp_path):
    keep = KeepPolicy(last=2, every_steps=4)
    with Checkpoints(tmp_path, keep) as checkpoints:
        for step in range(1, 11):
            if step == 3:
                keep.best_step = 3
            checkpoints.save(step, _state(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4, 8, 9, 10]
        keep.best_step = 9
        checkpoints.save(11, _state(11), {})
        checkpoints.save(12, _state(12), {})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 8, 9, 11, 12]


def test_saving_a_step_again_leaves_it_alone(tmp_path):
    with Checkpoints(tmp_path, KeepPolicy(last=2)) as checkpoints:
        checkpoints.save(1, _state(1), {"first": True})
        checkpoints.save(1, _state(2), {"first": False})
        checkpoints.wait()
        _, state, host = checkpoints.restore_latest(_abstract(), warn=_fail)
    assert host == {"first": True} and int(state["n"]) == 1


def test_host_books_are_copied_at_the_save(tmp_path):
    host = {"bad": [1]}
    with Checkpoints(tmp_path, KeepPolicy(last=2)) as checkpoints:
        checkpoints.save(1, _state(1), host)
        host["bad"].append(2)
        checkpoints.wait()
        assert checkpoints.restore_latest(_abstract(), warn=_fail)[2] == {"bad": [1]}


def test_too_little_space_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, KeepPolicy(last=2)) as checkpoints:
        checkpoints.save(1, _state(1), {})
        checkpoints.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(_state(1)))
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
        with pytest.raises(OSError, match="No space left") as caught:
            checkpoints.save(2, _state(2), {})
        assert caught.value.errno == errno.ENOSPC
        assert checkpoints.steps() == [1] and not list(tmp_path.glob("*tmp*"))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
        checkpoints.save(2, _state(2), {})


class Fails:
    """A write that fails in the background."""

    def result(self, timeout):
        raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize("handler", ["StandardCheckpointHandler", "JsonCheckpointHandler"])
def test_a_write_that_fails_is_told_at_once_and_raised(tmp_path, monkeypatch, handler):
    handler = getattr(ocp, handler)
    async_save = handler.async_save

    async def fail(*args, **kwargs):
        return [*await async_save(*args, **kwargs), Fails()]

    told = []
    with Checkpoints(tmp_path, KeepPolicy(last=2), on_failure=told.append) as checkpoints:
        checkpoints.save(1, _state(1), {})
        checkpoints.wait()
        monkeypatch.setattr(handler, "async_save", fail)
    with Checkpoints(tmp_path, KeepPolicy(last=2), on_failure=told.append) as checkpoints:
        checkpoints.save(2, _state(2), {})
        with pytest.raises(OSError, match="full"):
            checkpoints.wait()
        assert [error.errno for error in told] == [errno.ENOSPC]
        assert checkpoints.restore_latest(_abstract(), warn=_fail)[0] == 1


def test_restores_onto_another_mesh(tmp_path):
    one = make_mesh(devices=jax.devices()[:1])
    eight = make_mesh(data=2, fsdp=4)

    def placed(mesh, spec):
        tree = _state(3)
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
        shardings["w"] = NamedSharding(mesh, spec)
        return tree, shardings

    tree, shardings = placed(eight, PartitionSpec("fsdp"))
    with Checkpoints(tmp_path, KeepPolicy(last=1)) as checkpoints:
        checkpoints.save(1, jax.device_put(tree, shardings), {})
        checkpoints.wait()
        for mesh, spec in ((one, PartitionSpec()), (eight, PartitionSpec(None, "fsdp"))):
            tree, shardings = placed(mesh, spec)
            abstract = abstract_like(tree, shardings)
            _, restored, _ = checkpoints.restore_latest(abstract, warn=_fail)
            jax.tree.map(np.testing.assert_array_equal, restored, tree)
            assert restored["w"].sharding == shardings["w"]


def test_an_empty_directory_restores_nothing(tmp_path):
    with Checkpoints(tmp_path / "new", KeepPolicy(last=1)) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.restore_latest(_abstract(), warn=_fail) is None


@pytest.mark.parametrize("damage", ["state", "host", "array"])
def test_a_damaged_newest_step_falls_back_to_the_one_before(tmp_path, damage):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory, KeepPolicy(last=3)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(step), {"step": step})
    if damage == "array":
        for path in (directory / "2" / "state" / "d").iterdir():
            path.write_bytes(b"")
    else:
        shutil.rmtree(directory / "2" / damage)
    (directory / "7.orbax-checkpoint-tmp").mkdir()
    warnings = []
    with Checkpoints(directory, KeepPolicy(last=3)) as checkpoints:
        step, state, host = checkpoints.restore_latest(_abstract(), warn=warnings.append)
        assert (step, int(state["n"]), host) == (1, 1, {"step": 1})
        assert len(warnings) == 1 and "checkpoint 2 cannot be read" in warnings[0]
        checkpoints.save(2, _state(5), {"step": "again"})
        checkpoints.wait()
        assert checkpoints.restore_latest(_abstract(), warn=_fail)[2] == {"step": "again"}
    assert (tmp_path / "checkpoints_unreadable" / "2").is_dir()
    assert not (directory / "7.orbax-checkpoint-tmp").exists()


@pytest.mark.parametrize(
    "error",
    [ConnectionError("reset"), MemoryError(), ValueError("ABORTED: All 32 retry attempts failed")],
)
def test_a_fault_that_may_pass_is_no_damage(tmp_path, monkeypatch, error):
    """The step before would load: it must not be gone back to."""
    with Checkpoints(tmp_path, KeepPolicy(last=3)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(step), {})
        checkpoints.wait()
        handler = ocp.StandardCheckpointHandler
        restore = handler.restore

        def fail_at_2(self, directory, *args, **kwargs):
            if directory.parent.name == "2":
                raise error
            return restore(self, directory, *args, **kwargs)

        monkeypatch.setattr(handler, "restore", fail_at_2)
        with pytest.raises(PassingFault, match=r"checkpoint 2 in .*; run the same command again"):
            checkpoints.restore_latest(_abstract(), warn=_fail)
        monkeypatch.setattr(handler, "restore", restore)
        assert checkpoints.restore_latest(_abstract(), warn=_fail)[0] == 2
    assert not (tmp_path.with_name(tmp_path.name + "_unreadable")).exists()


def test_another_tree_is_an_error_that_names_the_directory(tmp_path):
    with Checkpoints(tmp_path, KeepPolicy(last=1)) as checkpoints:
        checkpoints.save(1, _state(1), {})
        checkpoints.wait()
        other = {**_abstract(), "new_leaf": _abstract()["w"]}
        with pytest.raises(ValueError, match=r"none of the checkpoints \[1\]"):
            checkpoints.restore_latest(other, warn=lambda _: None)
    assert (tmp_path / "1").is_dir()


# Saves step after step, each of a few MB, and says so once each save has begun.
SAVER = """
import jax, jax.numpy as jnp, sys
from dinov2_jax.checkpoints import Checkpoints, KeepPolicy
with Checkpoints(sys.argv[1], KeepPolicy(last=2)) as checkpoints:
    for step in range(1, 1000):
        checkpoints.save(step, {"w": jnp.full((1_500_000,), float(step))}, {"step": step})
        print(step, flush=True)
"""


def test_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    sharding = NamedSharding(make_mesh(devices=jax.devices()[:1]), PartitionSpec())
    abstract = {"w": jax.ShapeDtypeStruct((1_500_000,), jnp.float32, sharding=sharding)}
    last = 0
    for delay in (0.0, 0.02):
        command = [sys.executable, "-c", SAVER, str(tmp_path / str(delay))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(5):
            last = int(process.stdout.readline())
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Checkpoints(tmp_path / str(delay), KeepPolicy(last=2)) as checkpoints:
            step, state, host = checkpoints.restore_latest(abstract, warn=_fail)
            assert step >= last - 2 and host == {"step": step}
            assert set(np.unique(state["w"])) == {float(step)}
            checkpoints.save(step + 1, state, {})
            checkpoints.wait()
            assert not [p for p in checkpoints.directory.iterdir() if "tmp" in p.name]
