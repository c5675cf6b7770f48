"""The chunked search against one sort of all similarities, on one device and on eight."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dinov2_jax.features.read import ShardedArray
from dinov2_jax.neighbors import nearest_neighbors, seconds_per_step
from dinov2_jax.neighbors_plan import make_plan
from dinov2_jax.sharding import make_mesh


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


def mesh_of(num_devices: int) -> Mesh:
    return make_mesh(fsdp=min(2, num_devices), devices=jax.devices()[:num_devices])


@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("k, piece_rows", [(1, 1000), (9, 8), (53, 24)])
def test_devices_and_pieces_change_nothing(features, num_devices, k, piece_rows):
    """To the last bit, ties among them: every row of the bank is there twice, far apart."""
    queries, bank = features
    bank = np.concatenate([bank, bank])
    cut = dict(k=k, bank_chunk_size=4, query_chunk_size=3)
    expected = nearest_neighbors(queries, bank, mesh=mesh_of(1), **cut)
    cut |= dict(mesh=mesh_of(num_devices), piece_bytes=piece_rows // num_devices * 4 * 12)
    steps = []
    found = nearest_neighbors(queries, bank, on_step=steps.append, **cut)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    if k > 1:
        np.testing.assert_array_equal(found[1][:, 1], found[1][:, 0] + 53)
    plan = make_plan(7, 106, 12, **cut)
    assert steps == list(range(1, plan.num_steps + 1))
    assert plan.num_pieces == {(2, 1000): 1, (2, 8): 14, (2, 24): 5}.get(
        (num_devices, piece_rows), 4 if piece_rows < 1000 else 1
    )


def test_a_bank_on_disk_is_read_in_pieces(features, tmp_path):
    queries, bank = features
    reads = []

    class Recorded(ShardedArray):
        def __getitem__(self, key):
            reads.append(key)
            return super().__getitem__(key)

    np.save(tmp_path / "a.npy", bank[:20])
    np.save(tmp_path / "b.npy", bank[20:])
    shards = [np.load(tmp_path / name, mmap_mode="r") for name in ("a.npy", "b.npy")]
    cut = dict(k=5, bank_chunk_size=6)
    found = nearest_neighbors(
        queries, Recorded(shards, (12,), np.float32), mesh=mesh_of(2), piece_bytes=1, **cut
    )
    for ours, expected in zip(found, nearest_neighbors(queries, bank, **cut), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert sorted((key.start, key.stop) for key in reads) == [(i, i + 6) for i in range(0, 60, 6)]


def test_zeros_of_both_signs_are_equal():
    """Of width 1 a product is no sum, which would begin at +0."""
    bank = np.array([[-1], [1], [-2], [3]], np.float32)
    similarities, rows = nearest_neighbors(np.zeros((1, 1), np.float32), bank, k=4)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3]])
    assert not np.signbit(similarities).any()


def test_imagenet_is_planned():
    plan = make_plan(
        50_000, 1_281_167, 1_536, k=200, mesh=mesh_of(8), piece_bytes=2**30, query_chunk_size=1_000
    )
    chunk_bytes = 4 * 16_384 * 1_536
    assert plan.chunks_per_device == min(2**30 // chunk_bytes, -(-79 // 8)) == 10
    assert (plan.num_pieces, plan.num_steps) == (1, 50)
    streamed = make_plan(50_000, 1_281_167, 1_536, k=200, mesh=mesh_of(1), piece_bytes=2**30)
    assert streamed.num_pieces == -(-79 // (2**30 // chunk_bytes)) == 8
    table = 1_024 * (16_384 + 3 * 200)
    expected = 4 * (2 * 10 * 16_384 * 1_536 + 2 * 1_024 * 1_536 + 4 * table)
    assert streamed.device_bytes == expected
    assert seconds_per_step(make_plan(4, 40, 3, k=2, bank_chunk_size=8)) > 0


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
        for size in (5, 53):
            with pytest.raises(ValueError, match=r"bank: \d of 53 rows are not finite.*row 9"):
                nearest_neighbors(
                    queries, broken, k=1, bank_chunk_size=size, piece_bytes=1, mesh=mesh_of(1)
                )
        with pytest.raises(ValueError, match=r"queries: 2 of 53 rows are not finite.*row 9"):
            nearest_neighbors(broken, bank, k=1)


def test_a_callers_mesh_may_be_another():
    """In-run kNN searches on this host's devices inside the mesh of training."""
    rng = np.random.default_rng(0)
    queries, bank = rng.standard_normal((3, 4)), rng.standard_normal((9, 4))
    expected = nearest_neighbors(queries, bank, k=2)
    with jax.set_mesh(make_mesh(devices=jax.devices())):
        found = nearest_neighbors(queries, bank, k=2, mesh=make_mesh(devices=jax.devices()[:1]))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
