"""The loop's calendar; what the loop does is tested through the command (test_train.py)."""

import json

from dinov2_jax.loop import Rhythm, new_books


def test_things_are_due_at_multiples_and_after_the_last():
    rhythm = Rhythm(total=10, log=3, checkpoint=4, evaluate=0, teacher=20)

    def due(name):
        return [step for step in range(11) if rhythm.is_due(name, step)]

    assert due("log") == [3, 6, 9, 10]
    assert due("checkpoint") == [4, 8, 10]
    assert due("evaluate") == [0, 10]
    assert due("teacher") == [10]


def test_books_are_json():
    assert json.loads(json.dumps(new_books())) == new_books()
