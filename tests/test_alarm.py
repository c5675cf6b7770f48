"""One process that fails ends all, each with its line and the same code, and keeps nobody up."""

import threading
import types

import jax
import pytest

from dinov2_jax import alarm
from tests.two_processes import run_two

TWO_PROCESSES = """
import sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from dinov2_jax import commands, distributed

def run():
    distributed.initialize("on")
    if jax.process_index() == int(sys.argv[1]):
        raise {"wrong": ValueError, "mistake": ZeroDivisionError}[sys.argv[2]]("only here")
    multihost_utils.process_allgather(np.int32(1))
    return 0

sys.exit(commands.run_command(run))
"""


@pytest.mark.parametrize(
    ("failing", "error", "code", "why"),
    [
        ("0", "mistake", 1, "ZeroDivisionError: only here"),  # the coordinator is there
        ("1", "wrong", 2, "only here"),
    ],
)
def test_one_that_fails_alone_ends_the_other_that_waits_in_its_devices(failing, error, code, why):
    codes, said = run_two(TWO_PROCESSES, failing, error)
    assert codes == [code, code], said
    own, other = (said[int(failing)], said[1 - int(failing)])
    assert f"error: process {failing}: {why}\n" in own
    assert own.count("Traceback") == (error == "mistake")
    assert f"error: process {1 - int(failing)}: process {failing} failed: {why}\n" in other
    assert "Traceback" not in other


class Ended(BaseException):
    """In place of the end of the process."""


class Coordinator(dict):
    """Its keys, each of which is set once, as a process sees them."""

    num_processes, process_id = 2, 0

    @property
    def client(self):
        return self

    def key_value_set(self, key, value):
        if key in self:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self[key] = value

    def key_value_try_get(self, key):
        if key not in self:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self[key]


@pytest.fixture
def coordinator(monkeypatch):
    def leave(code):
        raise Ended(code)

    coordinator = Coordinator()
    monkeypatch.setattr(alarm, "global_state", coordinator)
    monkeypatch.setattr(alarm, "_ending", threading.RLock())
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("jax.distributed.shutdown", lambda: None)
    monkeypatch.setattr("os._exit", leave)
    return coordinator


def test_a_process_that_fails_of_the_same_keeps_its_own_line_and_code(coordinator, capsys):
    said = "2 process 1 failed: no such data"

    def fail():
        with pytest.raises(Ended, match="1"):
            alarm.ring("the\ndisk is full", 1)

    waits = []

    def wait(secs):
        waits.append(secs)
        if len(waits) == 2:  # nobody had failed in the first second
            coordinator["dinov2_jax/failure"] = said
        if len(waits) == 3:  # heard of the other; the main thread, here another, fails too
            main = threading.Thread(target=fail)
            main.start()
            main.join()
        return False

    alarm._watch(types.SimpleNamespace(wait=wait))
    assert capsys.readouterr().err == "error: process 0: the disk is full\n"
    assert list(coordinator.values()) == [said] and len(waits) == 3


def test_the_watch_ends_with_the_process_and_acts_no_more(coordinator, monkeypatch):
    ends, before = [], threading.enumerate()
    monkeypatch.setattr("atexit.register", ends.append)
    alarm.watch()
    (watch,) = set(threading.enumerate()) - set(before)
    ends[0]()
    assert not watch.is_alive()


def test_who_leaves_meets_the_others_and_ends_even_if_they_are_gone(coordinator, monkeypatch):
    def gone():
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    monkeypatch.setattr("jax.distributed.shutdown", gone)
    with pytest.raises(Ended, match="1"):
        alarm.ring("full", 1)


def test_a_single_process_goes_on(coordinator, capsys):
    coordinator.num_processes = 1
    alarm.ring(OSError("full"), 1, has_traceback=True)
    assert not coordinator and capsys.readouterr().err == ""
