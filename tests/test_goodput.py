"""Where the time goes: every second once, and what a kill undid counts as lost."""

import pytest

from dinov2_jax.goodput import FIELDS, KINDS, Goodput


class Clock:
    """Stands still but for `wait`."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def wait(self, secs):
        self.now += secs


def test_every_second_is_of_one_kind():
    clock = Clock()
    goodput = Goodput(clock)
    clock.wait(2)
    with goodput.spent_on("compile"):
        clock.wait(3)
    clock.wait(4)
    goodput.begin("step")
    clock.wait(10)
    with pytest.raises(ValueError, match="x"), goodput.spent_on("evaluate"):
        clock.wait(5)
        raise ValueError("x")
    clock.wait(1)
    goodput.move(2, "data_wait")
    expected = {"init": 6, "compile": 3, "step": 9, "data_wait": 2, "evaluate": 5}
    assert goodput.secs() == dict.fromkeys(KINDS, 0.0) | expected
    assert goodput.secs() == goodput.secs()
    fields = goodput.fields()
    assert tuple(fields) == FIELDS
    assert fields["goodput"] == 9 / 25 and fields["secs/init"] == 6
    assert goodput.describe() == (
        "goodput 36% of 25s: step 9s, init 6s, evaluate 5s, compile 3s, data wait 2s"
    )


def line(**secs):
    return {"step": 30, "goodput": 0.5} | {f"secs/{kind}": secs.get(kind, 0.0) for kind in KINDS}


def carried(saved, lines):
    goodput = Goodput(Clock())
    goodput.carry(saved, lines)
    return {kind: secs for kind, secs in goodput.secs().items() if secs}


def test_steps_after_the_checkpoint_are_lost_and_the_rest_of_that_time_is_what_it_was():
    saved = {"init": 5.0, "step": 20.0, "lost": 1.0}
    newest = line(init=5, step=27, checkpoint=2, lost=1)
    evaluation = {"step": 30, "eval_secs": 1.0}
    lines = [line(step=9), newest, evaluation]
    assert carried(saved, lines) == {"init": 5, "step": 20, "checkpoint": 2, "lost": 8}


def test_a_run_that_stopped_by_itself_has_lost_nothing():
    saved = {"init": 5.0, "step": 20.0}
    assert carried(saved, [line(init=5, step=19)]) == saved


def test_without_a_checkpoint_all_steps_are_lost():
    assert carried({}, [line(init=5, step=19)]) == {"init": 5, "lost": 19}
    assert carried({}, []) == {}
