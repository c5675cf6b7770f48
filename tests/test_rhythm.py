"""The rhythm of a run: what is due after which step."""

from dinov2_jax.rhythm import Rhythm


def test_things_are_due_at_multiples_and_after_the_last():
    rhythm = Rhythm(total=10, log=3, checkpoint=4, evaluate=0, teacher=20)

    def due(name):
        return [step for step in range(11) if rhythm.is_due(name, step)]

    assert due("log") == [3, 6, 9, 10]
    assert due("checkpoint") == [4, 8, 10]
    assert due("evaluate") == [0, 10]
    assert due("teacher") == [10]


def test_a_run_that_goes_on_after_the_first_traced_step_misses_the_trace():
    rhythm = Rhythm(total=10, log=3, checkpoint=4, evaluate=0, teacher=20, profile=(4, 6))
    assert [step for step in range(11) if rhythm.misses_profile(step)] == [5, 6, 7, 8, 9, 10]
    assert not Rhythm(total=10, log=3, checkpoint=4, evaluate=0, teacher=20).misses_profile(10)
