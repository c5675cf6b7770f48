"""The chunked search against one sort of all similarities."""

import numpy as np
import pytest

from dinov2_jax.neighbors import nearest_neighbors


def oracle(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All cosines in float64, one stable sort."""
    queries, bank = (x.astype(np.float64) for x in (queries, bank))
    cosines = np.array([[q @ b / np.sqrt((q @ q) * (b @ b)) for b in bank] for q in queries])
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, rows, axis=1), rows


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, np.ndarray]:
    """Queries [7, 12] and a bank [53, 12] of very different lengths."""
    rng = np.random.default_rng(0)
    queries, bank = rng.standard_normal((7, 12)), rng.standard_normal((53, 12))
    bank *= rng.uniform(0.01, 100, (53, 1))
    return queries.astype(np.float32), bank.astype(np.float32)


@pytest.mark.parametrize("k", [1, 5, 53])
@pytest.mark.parametrize("bank_chunk_size", [1, 8, 53, 1000])
def test_chunks_give_the_sort_of_everything(features, k, bank_chunk_size):
    found = nearest_neighbors(*features, k=k, bank_chunk_size=bank_chunk_size, query_chunk_size=3)
    similarities, rows = oracle(*features, k)
    np.testing.assert_array_equal(found[1], rows)
    np.testing.assert_allclose(found[0], similarities, atol=1e-6)
    assert found[0].dtype == np.float32 and found[1].dtype == np.int32


@pytest.mark.parametrize("bank_chunk_size", [2, 5, 40])
def test_ties_go_to_the_earlier_row(bank_chunk_size):
    # Small whole numbers: equal vectors have equal similarities, whatever the order of sums.
    bank = np.tile(np.array([[0, 3, 4, 0], [3, 4, 0, 0]], np.float32), (20, 1))
    queries = np.array([[6, 8, 0, 0], [0, 3, 4, 0]], np.float32)
    _, rows = nearest_neighbors(queries, bank, k=24, bank_chunk_size=bank_chunk_size)
    odd, even = np.arange(1, 40, 2), np.arange(0, 40, 2)
    np.testing.assert_array_equal(rows[0], [*odd, *even[:4]])
    np.testing.assert_array_equal(rows[1], [*even, *odd[:4]])


def test_padding_is_never_a_neighbour():
    """Every real similarity is negative: a row of zeros would come first."""
    bank = -np.eye(3, dtype=np.float32)
    similarities, rows = nearest_neighbors(np.ones((2, 3)), bank, k=3, bank_chunk_size=2)
    np.testing.assert_array_equal(rows, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(similarities, -1 / np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(features, scale):
    queries, bank = features
    expected = nearest_neighbors(queries, bank, k=4)
    found = nearest_neighbors(queries * np.float32(scale), bank * np.float32(scale / 100), k=4)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)


def test_zero_vectors_are_similar_to_nothing(features):
    queries, bank = (x.copy() for x in features)
    queries[0] = 0
    bank[5] = 0
    similarities, rows = nearest_neighbors(queries, bank, k=53)
    assert np.isfinite(similarities).all()
    np.testing.assert_array_equal(similarities[0], np.zeros(53))
    np.testing.assert_array_equal(rows[0], np.arange(53))
    assert (similarities[1:][rows[1:] == 5] == 0).all()


def test_no_queries_give_no_neighbours(features):
    similarities, rows = nearest_neighbors(features[0][:0], features[1], k=3)
    assert similarities.shape == rows.shape == (0, 3)


def test_errors_name_value_and_cure(features):
    queries, bank = features
    with pytest.raises(ValueError, match="k=54 must be between 1 and the bank's 53 rows"):
        nearest_neighbors(queries, bank, k=54)
    with pytest.raises(ValueError, match="k=0 must be"):
        nearest_neighbors(queries, bank, k=0)
    with pytest.raises(ValueError, match=r"\(7, 11\).*\(53, 12\) must have the same width"):
        nearest_neighbors(queries[:, 1:], bank, k=1)
    with pytest.raises(ValueError, match=r"queries \(12,\) must be \[rows, width\]"):
        nearest_neighbors(queries[0], bank, k=1)
    for bad in (np.nan, np.inf):
        broken = bank.copy()
        broken[[9, 11], 2] = bad
        with pytest.raises(ValueError, match=r"bank: 2 of 53 rows are not finite.*row 9"):
            nearest_neighbors(queries, broken, k=1)
