"""The planned search: what it says, and that it is the search."""

import re
import tracemalloc

import numpy as np

from dinov2_jax.evals import search as module
from dinov2_jax.evals.search import rankings, search
from dinov2_jax.features.read import ShardedArray
from dinov2_jax.neighbors import nearest_neighbors
from dinov2_jax.neighbors_plan import QUERY_CHUNK_SIZE


def test_it_is_the_search_and_says_what_it_takes(monkeypatch, capsys):
    rng = np.random.default_rng(0)
    queries, bank = rng.standard_normal((9, 6)), rng.standard_normal((31, 6))
    said = []
    found = search(queries, bank, k=3, say=said.append)
    for ours, expected in zip(found, nearest_neighbors(queries, bank, k=3), strict=True):
        np.testing.assert_array_equal(ours, expected)
    (line,) = said
    assert re.fullmatch(
        r"search: the 3 nearest of 31 rows for 9 queries, width 6: on 8 devices, at most "
        r"0\.00 GiB on each",
        line,
    )
    monkeypatch.setattr(module, "_TIMED_FROM", 1)
    search(queries, bank, k=3, say=said.append)
    assert re.search(r"on each, about \d+s$", said[1])
    assert "search step 1/1" in capsys.readouterr().out


def test_queries_on_disk_are_read_a_chunk_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2500, 2)).astype(np.float32)
    queries, read = ShardedArray([rows], (2,), rows.dtype), []
    take = ShardedArray.__getitem__

    def noted(self, key):
        found = take(self, key)
        read.append(len(found))
        return found

    monkeypatch.setattr(ShardedArray, "__getitem__", noted)
    search(queries, rows[:5], k=1, say=lambda _: None, is_shown=False)
    assert 0 < max(read) <= QUERY_CHUNK_SIZE < len(rows)


def test_whole_rankings_come_a_few_queries_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    queries, bank = rng.standard_normal((100, 4)), rng.standard_normal((3000, 4))
    bank[7] = bank[1900]  # equals: the earlier row comes first
    _, expected = nearest_neighbors(queries, bank, k=3000)
    monkeypatch.setattr(module, "_RANKED_BYTES", 3 * 8 * 3000)
    said = []
    settings = dict(say=said.append, is_shown=False)
    found = rankings(queries, bank, **settings)
    compiled = list(rankings(queries[:4], bank, **settings))
    assert len(compiled) == 4
    tracemalloc.start()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said[0].endswith("GiB on each, 3 queries at a time")
    assert peak < 8 * 100 * 3000 / 2  # half of what all of them take
    assert len(list(rankings(queries[:2], bank, **settings))) == 2
    assert "at a time" not in said[2]
