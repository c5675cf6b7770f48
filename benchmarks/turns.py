"""Contenders that take turns on one machine, so that other work disturbs all of them alike.

A contender is a function that does its work once and returns the wall and CPU seconds it took;
`Child` is one in a process of its own, with its own libraries, threads and memory.
"""

import ctypes
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Mapping

import numpy as np


def limit_threads(num_threads: int) -> None:
    """Leaves this process and its children so many cores; before a library makes its threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_threads])


def timed(work: Callable[[], object]) -> np.ndarray:
    """Wall and CPU seconds of one call, `[2]`; CPU seconds are those of all threads."""
    started = time.perf_counter(), time.process_time()
    work()
    ended = time.perf_counter(), time.process_time()
    return np.subtract(ended, started)


def take_turns(
    contenders: Mapping[str, Callable[[], np.ndarray]], num_rounds: int, *, num_warmups: int = 1
) -> dict[str, np.ndarray]:
    """Seconds of each contender, `[rounds, 2]`; the rounds that warm up are left out."""
    seconds = {name: [] for name in contenders}
    for _ in range(num_warmups + num_rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender())
    return {name: np.array(rows[num_warmups:]) for name, rows in seconds.items()}


def median_ratios(seconds: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """What a contender took in times of "ours", wall and CPU: medians of ratios inside a turn."""
    return np.median(seconds[name] / seconds["ours"], axis=0)


class Child:
    """A contender in a fresh process.

    Args:
      start: importable function; `start(*arguments)` runs in the child and returns its work, a
        function without arguments whose first result is kept as `first`.
    """

    def __init__(self, start: Callable[..., Callable[[], object]], *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, start, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.first = self._pipe.recv()

    def __call__(self) -> np.ndarray:
        self._pipe.send("work")
        return self._pipe.recv()

    def finish(self) -> float:
        """Ends the process; its largest resident memory in MB since the first call was done."""
        self._pipe.send("finish")
        peak = self._pipe.recv()
        self._process.join()
        return peak


def _serve(pipe, start, arguments) -> None:
    work = start(*arguments)
    pipe.send(work())
    _reset_peak()
    while pipe.recv() == "work":
        pipe.send(timed(work))
    pipe.send(_peak_mb())


def _reset_peak() -> None:
    """Leaves what compilation and loading needed out of the peak: for all contenders alike."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_mb() -> float:
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1]) * 1024 / 1e6
