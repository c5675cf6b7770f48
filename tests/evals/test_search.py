"""The planned search: what it says, and that it is the search."""

import re

import numpy as np

from dinov2_jax.evals import search as module
from dinov2_jax.evals.search import search
from dinov2_jax.neighbors import nearest_neighbors


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
