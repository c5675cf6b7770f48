"""What goes round once a step, and that a single process needs no round."""

import types

import numpy as np

from dinov2_jax.exchange import Exchange
from dinov2_jax.sharding import make_mesh


def test_several_processes_hear_of_every_bad_record_and_signal(monkeypatch):
    """On one process that believes to be one of two: its own word comes back from each device."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    signals = types.SimpleNamespace(received=None)
    exchange = Exchange(make_mesh(), signals)
    big = 2**40 + 3
    heard = exchange.hear(exchange.say(np.array([-1, big])))
    assert set(heard.tolist()) == {-1, big}
    assert exchange.stop == 0
    signals.received = 15
    word = exchange.say(np.array([-1, -1]))
    assert exchange.stop == 0  # others know only when they have heard it
    exchange.hear(word)
    assert exchange.stop == 15


def test_a_single_process_needs_no_devices():
    signals = types.SimpleNamespace(received=None)
    exchange = Exchange(make_mesh(), signals)
    records = np.array([-1, 5])
    assert exchange.hear(exchange.say(records)) is records
    signals.received = 2
    assert exchange.stop == 2
