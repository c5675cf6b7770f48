"""The global order: passes, mixtures and replacements as pure functions of the position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_jax.data import order
from dinov2_jax.data.order import Order, stream_rng
from dinov2_jax.data.records import DataError


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 300), seed=st.integers(0, 2**40), pass_index=st.integers(0, 10**6))
def test_every_pass_reads_every_record_once(length, seed, pass_index):
    one = Order((length,), seed=seed)
    records = [one.record(pass_index * length + i) for i in range(length)]
    assert sorted(records) == list(range(length))
    # A position asks nothing of those before it.
    assert Order((length,), seed=seed).record(pass_index * length) == records[0]


def test_passes_and_seeds_differ():
    def read(seed, pass_index):
        one = Order((100,), seed=seed)
        return [one.record(100 * pass_index + i) for i in range(100)]

    orders = [read(0, 0), read(0, 1), read(1, 0), list(range(100))]
    for i in range(4):
        for j in range(i):
            assert np.mean(np.equal(orders[i], orders[j])) < 0.1
    assert read(0, 1) == read(0, 1)


def test_the_first_record_is_uniform():
    first = [Order((5,), seed=seed).record(0) for seed in range(1000)]
    assert np.bincount(first, minlength=5).min() > 150  # 200 expected, standard deviation 13


def test_large_sources_are_shuffled_without_a_table(monkeypatch):
    monkeypatch.setattr(order, "_MAX_PERMUTED", 10)
    length = 3001
    large = Order((length,), seed=3)
    passes = [[large.record(p * length + i) for i in range(length)] for p in range(2)]
    for records in passes:
        assert sorted(records) == list(range(length))
        assert abs(np.corrcoef(records, range(length))[0, 1]) < 0.1
    assert np.mean(np.equal(*passes)) < 0.01


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=2, max_size=5),
    start=st.integers(0, 10**7),
    data=st.data(),
)
def test_a_mixture_keeps_its_shares_everywhere(lengths, start, data):
    weights = data.draw(
        st.lists(st.floats(0.05, 1.0), min_size=len(lengths), max_size=len(lengths))
    )
    mixed = Order(tuple(lengths), seed=1, weights=tuple(weights))
    records = [mixed.record(start + i) for i in range(400)]
    parts = np.searchsorted(np.cumsum(lengths), records, side="right")
    counts = np.bincount(parts, minlength=len(lengths))
    ideal = 400 * np.array(weights) / sum(weights)
    assert np.abs(counts - ideal).max() <= len(lengths) + 1


def test_a_mixture_reads_each_source_in_passes():
    """Across the table's end too: a source's turns count on."""
    lengths = (7, 11)
    mixed = Order(lengths, seed=5, weights=(0.3, 0.7))
    start = order._TABLE_SIZE - 150
    records = np.array([mixed.record(i) for i in range(start, start + 300)])
    for part, length in enumerate(lengths):
        offset = sum(lengths[:part])
        own = records[(records >= offset) & (records < offset + length)] - offset
        # Some window of one pass after another, wherever the first begins.
        assert any(
            all(
                sorted(own[begin + k : begin + k + length]) == list(range(length))
                for k in range(0, len(own) - begin - length + 1, length)
            )
            for begin in range(length)
        )


def test_without_weights_sources_share_by_length():
    mixed = Order((10, 30), seed=0)
    records = [mixed.record(i) for i in range(4000)]
    assert np.mean(np.array(records) < 10) == pytest.approx(0.25, abs=0.005)


def test_a_weight_near_zero_still_gets_turns():
    mixed = Order((5, 5), seed=0, weights=(1e-9, 1.0))
    assert min(mixed.record(i) for i in range(1 << 16)) < 5


def test_weights_must_be_positive():
    for weights in ((0.0, 1.0), (-1.0, 2.0), (float("nan"), 1.0)):
        with pytest.raises(DataError, match="must be positive"):
            Order((5, 5), seed=0, weights=weights)


def test_replacements_come_from_the_same_source_and_vary():
    mixed = Order((10, 1000), seed=0, weights=(0.5, 0.5))
    for position in range(20):
        is_first = mixed.record(position) < 10
        replacements = [mixed.replacement(position, attempt) for attempt in range(30)]
        assert all((r < 10) == is_first for r in replacements)
        assert len(set(replacements)) > 3
        assert replacements[0] == Order((10, 1000), seed=0, weights=(0.5, 0.5)).replacement(
            position, 0
        )


def test_streams_are_independent():
    draws = {
        (seed, stream, index): stream_rng(seed, stream, index).random()
        for seed in range(3)
        for stream in range(4)
        for index in range(5)
    }
    assert len(set(draws.values())) == len(draws)
    assert stream_rng(0, 1, 2).random() == draws[0, 1, 2]
