"""Whitened features have cosines of Mahalanobis' product, however few rows are turned at once."""

import tracemalloc

import numpy as np
import pytest

from dinov2_jax.evals import whitening
from dinov2_jax.evals.whitening import whitened


@pytest.fixture
def database():
    rng = np.random.default_rng(0)
    return rng.standard_normal((400, 5)) * [5, 3, 1, 1, 0.1]


def test_cosines_are_those_of_mahalanobis(database):
    found, other = whitened(5, database, 7 * database[:3])
    assert found.dtype == other.dtype == np.float32
    np.testing.assert_allclose(found[:3], other, rtol=1e-5)
    unit = database / np.linalg.norm(database, axis=1, keepdims=True)
    unit -= unit.mean(axis=0)
    inner = unit @ np.linalg.inv(np.cov(unit, rowvar=False)) @ unit.T
    expected = inner / np.sqrt(np.outer(np.diag(inner), np.diag(inner)))
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-5)
    assert whitened(2, database)[0].shape == (400, 2)
    assert whitened(None, database)[0] is database


def test_rows_in_pieces_are_those_at_once(database, monkeypatch):
    expected = whitened(4, database, database[:30])
    monkeypatch.setattr(whitening, "_ROWS_AT_ONCE", 7)
    for ours, theirs in zip(whitened(4, database, database[:30]), expected, strict=True):
        np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-6)


def test_few_rows_have_few_directions(database):
    (found,) = whitened(2, database[:3])
    assert found.shape == (3, 2)
    with pytest.raises(ValueError, match="between 1 and the 2 directions"):
        whitened(3, database[:3])


def test_memory_is_that_of_the_result_and_a_few_rows(monkeypatch):
    monkeypatch.setattr(whitening, "_ROWS_AT_ONCE", 500)
    database = np.random.default_rng(0).standard_normal((20_000, 16), np.float32)
    tracemalloc.start()
    (found,) = whitened(16, database)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.nbytes < peak < 1.5 * found.nbytes
