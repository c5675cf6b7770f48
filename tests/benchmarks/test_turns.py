"""Contenders take turns, each in a process of its own; ratios are of one turn."""

import os
import time

import numpy as np
import pytest

from benchmarks.turns import Child, median_ratios, take_turns, timed


def test_turns_go_round_and_warmups_are_left_out():
    calls, clock = [], iter(range(100))

    def contender(name):
        calls.append(name)
        return np.array([float(next(clock)), 1.0])

    contenders = {name: (lambda name=name: contender(name)) for name in ("ours", "theirs")}
    seconds = take_turns(contenders, 2, num_warmups=1)
    assert calls == ["ours", "theirs"] * 3
    assert seconds["ours"].tolist() == [[2.0, 1.0], [4.0, 1.0]]
    assert seconds["theirs"].tolist() == [[3.0, 1.0], [5.0, 1.0]]
    assert median_ratios(seconds, "theirs").tolist() == [(3 / 2 + 5 / 4) / 2, 1.0]


def test_timed_tells_waiting_from_work():
    wall, cpu = timed(lambda: time.sleep(0.2))
    assert wall >= 0.2 and cpu < wall / 2


def start(megabytes: int):
    """Work whose first call takes memory and gives it back; later calls take half as much."""
    sizes = iter([megabytes, *[megabytes // 2] * 5])

    def work():
        block = np.ones(next(sizes) * 125_000)  # 8 bytes each
        return os.getpid(), block.nbytes

    return work


def test_a_child_is_another_process_and_its_peak_leaves_the_first_call_out():
    child = Child(start, 400)
    pid, num_bytes = child.first
    assert pid != os.getpid() and num_bytes == 400e6
    assert child().shape == (2,)
    assert child.finish() == pytest.approx(200, abs=150)  # and Python with numpy
