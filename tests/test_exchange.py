"""What goes round once a step, and that a single process needs no round."""

import types

import numpy as np

from dinov2_jax.exchange import Exchange, of_primary
from dinov2_jax.sharding import make_mesh
from tests.two_processes import run_two


def test_several_processes_hear_of_every_bad_record_and_signal(monkeypatch):
    """On one process that believes to be one of two: its own word comes back from each device."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    signals = types.SimpleNamespace(received=None)
    exchange = Exchange(make_mesh(), signals)
    big = 2**40 + 3
    heard = exchange.hear(exchange.say(np.array([-1, big]), wait_secs=1.25))
    assert set(heard.bad_record.tolist()) == {-1, big} and heard.wait_secs == 1.25
    assert exchange.stop == 0
    signals.received = 15
    word = exchange.say(np.array([-1, -1]), wait_secs=0.0)
    assert exchange.stop == 0  # others know only when they have heard it
    exchange.hear(word)
    assert exchange.stop == 15


def test_a_single_process_needs_no_devices():
    signals = types.SimpleNamespace(received=None)
    exchange = Exchange(make_mesh(), signals)
    records = np.array([-1, 5])
    heard = exchange.hear(exchange.say(records, wait_secs=0.1))
    assert heard.bad_record is records and heard.wait_secs == 0.1
    signals.received = 2
    assert exchange.stop == 2
    assert of_primary({"a": 0.1}) == {"a": 0.1}


TWO = """
import types, jax, numpy as np
from dinov2_jax import distributed
from dinov2_jax.exchange import Exchange, of_primary
from dinov2_jax.sharding import make_mesh
distributed.initialize("on")
own = jax.process_index()
print("primary's", of_primary({"a": 0.1 + own / 3, "b": 2.0**60 + own}))
exchange = Exchange(make_mesh(), types.SimpleNamespace(received=None))
heard = exchange.hear(exchange.say(np.array([own]), wait_secs=0.5 + own))
print("heard", sorted(set(heard.bad_record.tolist())), heard.wait_secs)
"""


def test_two_processes_go_by_the_numbers_of_the_first_and_by_the_longest_waiting():
    codes, said = run_two(TWO)
    assert codes == [0, 0], said
    for words in said:
        assert f"primary's {{'a': 0.1, 'b': {2.0**60}}}" in words
        assert "heard [0, 1] 1.5" in words
