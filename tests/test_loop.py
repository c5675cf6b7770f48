"""The loop with parts that do nothing; with real ones the command is tested (test_train.py)."""

import copy
import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from dinov2_jax.exchange import Exchange
from dinov2_jax.goodput import Goodput
from dinov2_jax.guards import StopRun
from dinov2_jax.loop import Limits, Loop, new_books
from dinov2_jax.optim.schedules import Hyperparameters
from dinov2_jax.rhythm import Rhythm
from dinov2_jax.sharding import make_mesh
from dinov2_jax.speed import Speed


def test_books_are_json():
    assert json.loads(json.dumps(new_books())) == new_books()


class _Anything:
    """Takes every call and remembers the names of those made."""

    def __init__(self, calls):
        self.calls = calls
        self.keep = types.SimpleNamespace(best_step=None)
        self.wait_secs, self.count, self.records = 0.0, 0, set()

    def __getattr__(self, name):
        def call(*args, **_):
            self.calls.append((name, *[arg for arg in args if isinstance(arg, int)]))

        return call

    def take(self):
        batch = types.SimpleNamespace(index=np.arange(2), bad_record=np.full(2, -1))
        return types.SimpleNamespace(device={}, host=batch)


def _loop(calls, *, stop_at: int, total: int = 3, every=0, evaluate=None, keep_best=False):
    """A loop whose parts do nothing; a signal comes while step `stop_at` runs."""
    signals, parts = types.SimpleNamespace(received=None), _Anything(calls)

    def train_step(state, batch, hyper):
        if state + 1 == stop_at:
            signals.received = 15
        return state + 1, {"nonfinite": 0, "total_loss": 1.0}

    def evaluate_teacher(teacher, step):
        calls.append(("evaluate", step))
        return {"knn/x/cls": 0.5}

    class State(int):
        teacher = None
        __add__ = lambda self, other: State(int(self) + other)  # noqa: E731

    loop = Loop(
        workdir=None,
        state=State(0),
        step=0,
        books=new_books(),
        train_step=train_step,
        schedules=types.SimpleNamespace(at=lambda step: Hyperparameters(0, 0, 0, 0, 0)),
        feed=parts,
        images_per_step=2,
        speed=Speed(images=2, model_flops=1.0, executed_flops=1.0, devices=jax.devices()[:1]),
        goodput=Goodput(),
        rhythm=Rhythm(total=total, log=1, checkpoint=0, evaluate=every, teacher=every),
        limits=Limits(max_nonfinite_steps=0, check_collapse=False, warmup_steps=0),
        checkpoints=parts,
        writer=parts,
        display=parts,
        bad_images=parts,
        evaluate=evaluate or evaluate_teacher,
        evaluation="x",
        best_metric="knn/x/cls",
        keep_best=keep_best,
        write_teacher=lambda teacher, step: calls.append(("teacher", step)),
        exchange=Exchange(make_mesh(), signals),
    )
    return loop


def test_a_signal_in_the_last_step_does_not_lose_what_the_last_step_owes():
    calls = []
    assert _loop(calls, stop_at=3).run()
    assert ("evaluate", 3) in calls and ("teacher", 3) in calls


def test_the_next_batch_is_sent_while_a_step_computes_and_waiting_for_it_counts():
    calls = []
    loop = _loop(calls, stop_at=-1)
    train_step, feed, write = loop.train_step, loop.feed, loop.writer

    def peek(computing):
        calls.append(("peek", computing["nonfinite"]))
        feed.wait_secs += 1000.0

    def step(state, batch, hyper):
        calls.append(("train_step", state + 1))
        return train_step(state, batch, hyper)

    feed.peek, loop.train_step = peek, step
    write.write = lambda step, values: calls.append(("write", step))
    loop.run()
    order = [call[0] for call in calls if call[0] in ("train_step", "peek", "write")]
    # A line of the step before comes after it; of the evaluations' lines first and last.
    assert order == [
        "write",
        *2 * ["train_step", "peek"],
        "write",
        "train_step",
        "write",
        "write",
        "write",
    ]
    assert loop.goodput.secs()["data_wait"] == 2000.0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_before_stops_without_an_evaluation(monkeypatch, processes):
    """Of several processes it is heard of when the step is there: when the evaluation is due."""
    monkeypatch.setattr("jax.process_count", lambda: processes)
    calls = []
    loop = _loop(calls, stop_at=2, every=1)
    assert not loop.run()
    assert loop.step == 2 and ("evaluate", 1) in calls and ("write", 2) in calls
    assert ("evaluate", 2) not in calls and ("teacher", 2) not in calls


def test_a_kill_during_an_evaluation_loses_no_step():
    """The checkpoint of the same step is begun before; what resumes from it owes the evaluation."""
    calls = []

    def evaluate(teacher, step):
        calls.append(("evaluate", step))
        if step == 2:
            raise KeyboardInterrupt
        return {"knn/x/cls": 0.5}

    loop = _loop(calls, stop_at=-1, every=2, evaluate=evaluate)
    saved = {}
    loop.rhythm = dataclasses.replace(loop.rhythm, checkpoint=2)
    loop.checkpoints = types.SimpleNamespace(
        save=lambda step, state, books: saved.update(step=step, books=copy.deepcopy(books))
    )
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert saved["step"] == 2 and saved["books"]["evaluated_step"] == 0
    resumed = _loop(calls, stop_at=-1, every=2)
    resumed.step, resumed.books = saved["step"], saved["books"]
    calls.clear()
    resumed.run()
    assert [call for call in calls if call[0] == "evaluate"] == [("evaluate", 2), ("evaluate", 3)]


def test_an_evaluation_that_cannot_be_done_stops_the_run_in_one_line():
    def evaluate(teacher, step):
        raise ValueError("feature row 3 is not finite")

    with pytest.raises(StopRun, match="evaluation after step 0 failed: feature row 3"):
        _loop([], stop_at=-1, evaluate=evaluate).run()


@pytest.mark.parametrize(("before", "best"), [("x", 1), ("another", 3)])
def test_the_best_is_not_compared_with_that_of_another_evaluation(before, best):
    loop = _loop([], stop_at=-1, keep_best=True)
    loop.books |= {"evaluation": before, "evaluated_step": 0, "best": {"step": 1, "value": 0.9}}
    loop.books["collapse"] |= {"knn_start": 0.9, "knn_last": 0.9}
    loop.checkpoints.keep.best_step = 1  # stays until the new evaluation has a best of its own
    loop.limits = dataclasses.replace(loop.limits, check_collapse=True)
    loop.last_evaluation = {"knn/x/chance": 0.1}
    loop.run()
    assert loop.checkpoints.keep.best_step == loop.books["best"]["step"] == best
    assert loop.books["evaluation"] == "x"
    assert loop.books["collapse"]["knn_start"] == (0.9 if before == "x" else 0.5)
    assert ("knn/x/chance" in loop.last_evaluation) == (before == "x")
