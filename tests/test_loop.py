"""The loop's books; what the loop does is tested through the command (test_train.py)."""

import json

from dinov2_jax.loop import new_books


def test_books_are_json():
    assert json.loads(json.dumps(new_books())) == new_books()
