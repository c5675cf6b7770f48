"""The prototypes' kernels for TPU: compiled for several chips, and against their formulas by tiles.

That losses and gradients by kernels are the dense ones: test_block_cross_entropy.py, interpreted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dinov2_jax.cost.topology import open_topology
from dinov2_jax.losses import cross_entropy_pallas, pallas_tiles, sinkhorn_pallas
from dinov2_jax.losses.head_modes import BlockHeads
from dinov2_jax.models.heads import DINOHead, Head
from dinov2_jax.sharding import BATCH_AXES, make_mesh
from tests.any_order import assert_same_in_any_order

TOLERANCE = 1e-5


@pytest.fixture(params=[(5, 7), (128, 384), (1030, 700)], ids=str)
def case(request):
    """One tile, whole tiles, and several tiles with padding in each direction."""
    n, k = request.param
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return dict(rows=draw(n, 16), weight=draw(k, 16), v=np.abs(draw(n)), u=np.abs(draw(k)))


def test_sums_over_rows_and_over_prototypes(case):
    rows, weight, v, u = case.values()
    logits = np.float64(rows) @ np.float64(weight).T
    prototypes = 2 * weight, np.full((len(u), 1), 0.5, np.float32)
    row_max = sinkhorn_pallas.largest_logits(rows, prototypes)
    np.testing.assert_allclose(row_max, logits.max(axis=1), rtol=TOLERANCE, atol=TOLERANCE)
    matrix = np.exp((logits - np.float64(row_max)[:, None]) / 0.5)
    got = sinkhorn_pallas.sum_rows(rows, prototypes, row_max, v, 0.5)
    np.testing.assert_allclose(got, v @ matrix, rtol=2 * TOLERANCE)
    got = sinkhorn_pallas.sum_prototypes(rows, prototypes, row_max, u, 0.5)
    np.testing.assert_allclose(got, matrix @ u, rtol=2 * TOLERANCE)


def test_padding_adds_nothing_wherever_logits_lie(case):
    """All logits are -1e4, and so is the rows' shift: what padding's 0 is above it, exp(1e4)."""
    rows, weight, v, u = case.values()
    rows, weight = np.zeros_like(rows), np.zeros_like(weight)
    rows[:, 0], weight[:, 0] = 1e4, -1
    low, prototypes = jnp.full(len(v), -1e4), (weight, np.ones((len(u), 1), np.float32))
    np.testing.assert_array_equal(sinkhorn_pallas.largest_logits(rows, prototypes), low)
    got = sinkhorn_pallas.sum_prototypes(rows, prototypes, low, u, 1.0)
    np.testing.assert_allclose(got, np.full(len(v), u.sum()), rtol=TOLERANCE)
    got = sinkhorn_pallas.sum_rows(rows, prototypes, low, v, 1.0)
    np.testing.assert_allclose(got, np.full(len(u), v.sum()), rtol=TOLERANCE)


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("size", [1, 128, 511, 513, 2450, 65_536])
def test_tiles_cover_with_little_padding(size, multiple):
    padded, tile = pallas_tiles.tiles(size, multiple=multiple)
    assert padded % tile == tile % pallas_tiles.LANES == 0
    assert padded >= size
    assert tile <= pallas_tiles.TILE
    assert (padded // tile) % multiple == 0 or padded == tile
    assert padded - size < multiple * pallas_tiles.TILE


@pytest.mark.parametrize(("mib", "rows"), [(16, 0), (32, 5120), (64, 21_504), (128, 54_272)])
def test_rows_of_a_call_are_whole_tiles_of_what_the_vector_memory_holds(monkeypatch, mib, rows):
    chip = type("Chip", (), {"vmem_capacity_bytes": mib * 2**20})
    monkeypatch.setattr(cross_entropy_pallas.pltpu, "is_tpu_device", lambda: True)
    monkeypatch.setattr(cross_entropy_pallas.pltpu, "get_tpu_info", lambda: chip)
    assert cross_entropy_pallas.rows_that_fit(256) == rows
    # The sums' kernel needs 38 MiB.
    most = cross_entropy_pallas.MAX_CALLS * rows if mib > 38 else 0
    assert cross_entropy_pallas.fits(most, 256) == (mib > 38)
    assert not cross_entropy_pallas.fits(most + 1, 256)


def test_more_rows_than_a_call_holds_are_taken_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    n, k, d = 120, 200, 16
    draw = lambda *shape: rng.uniform(0.5, 1, shape).astype(np.float32)  # noqa: E731
    prototypes = [(draw(k, d), draw(k, 1)) for _ in range(2)]
    rows = [draw(n, d), prototypes[0], draw(n, d), prototypes[1], (draw(n), draw(n))]
    vectors = dict(norms=draw(k, 1), log_sum=draw(n), mass=draw(n), cotangent=draw(n))

    def run(rows_that_fit):
        monkeypatch.setattr(cross_entropy_pallas, "rows_that_fit", lambda d: rows_that_fit)
        return cross_entropy_pallas.gradients(*rows, log_scale, -jnp.inf, (5.0, 5.0), **vectors)

    log_scale = draw(k)
    assert "length=3" in str(jax.make_jaxpr(lambda: run(50))())  # of the scan over pieces
    want, got = jax.tree.leaves(run(n)), jax.tree.leaves(run(50))
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, atol=TOLERANCE * np.abs(right).max())


def test_tiles_may_come_in_any_order():
    rng = np.random.default_rng(0)
    n, k, d = 2100, 1100, 16  # three tiles of rows, or five, and three or four of prototypes
    draw = lambda *shape: rng.uniform(0.1, 0.3, shape).astype(np.float32)  # noqa: E731

    def run(features, others, directions, lengths, row_vector, vector):
        prototypes = directions, lengths
        row_max = sinkhorn_pallas.largest_logits(features, prototypes)
        rows = features, prototypes, others, prototypes, (row_max, row_vector), vector
        rows = *rows, -jnp.inf, (0.5, 0.5)
        vectors = dict(norms=lengths, log_sum=row_vector, mass=row_vector, cotangent=row_vector)
        return (
            row_max,
            sinkhorn_pallas.sum_rows(features, prototypes, row_max, row_vector, 0.5),
            sinkhorn_pallas.sum_prototypes(features, prototypes, row_max, vector, 0.5),
            cross_entropy_pallas.row_sums(*rows),
            cross_entropy_pallas.gradients(*rows, **vectors),
        )

    arrays = draw(n, d), draw(n, d), draw(k, d), draw(k, 1), draw(n), draw(k)
    names = ("max", "sum_rows", "sum", "cross_entropy", "gradients")
    assert_same_in_any_order(run, *arrays, kernels={f"prototypes_{name}" for name in names})


def compile_step(mesh, *, k: int):
    """Targets, the iBOT loss of 600 rows and its gradient for prototypes that `model` cuts."""
    heads = BlockHeads(has_kernels=True)
    module = DINOHead(num_prototypes=k, bottleneck_dim=256, num_layers=1, dtype=jnp.bfloat16)

    def run(student, teacher, features):
        head = Head(module, teacher)
        target, _ = heads.targets(
            head,
            heads.rows(head, features),
            is_real=jnp.ones(features.shape[:-1], bool),
            center=jnp.zeros(k),
            temp=0.07,
            centering="sinkhorn_knopp",
            num_sinkhorn_iters=3,
            center_momentum=0.9,
        )
        weights = jnp.ones(features.shape[:-1])
        loss = functools.partial(heads.ibot_loss, num_crops=1, student_temp=0.1)
        return jax.grad(lambda params: loss(Head(module, params), features, target, weights))(
            student
        )

    def place(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    def init():
        return module.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]

    params = jax.tree.map(
        lambda x: place(x, PartitionSpec("model" if x.shape[0] == k else None)),
        jax.eval_shape(init),
    )
    features = place(jax.ShapeDtypeStruct((2, 600, 64), jnp.float32), PartitionSpec(BATCH_AXES))
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(params, params, features).compile()


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpus(topology):
    """Five kernels on each of four chips, and nothing [rows, k]."""
    mesh = make_mesh(data=2, model=2, devices=open_topology(topology).devices[:4])
    text = compile_step(mesh, k=4096).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 5
    assert "[600,2048]" not in text


@pytest.mark.usefixtures("libtpu")
def test_memory_does_not_grow_with_the_prototypes():
    """Of gradients too large for the chip's vector memory, where they would count as nothing."""
    mesh = make_mesh(data=1, model=1, devices=open_topology("v5e:2x2").devices[:1])
    small, large = (compile_step(mesh, k=k).memory_analysis() for k in (131_072, 262_144))
    growth = large.temp_size_in_bytes - small.temp_size_in_bytes
    vectors = 40 * 4 * 131_072  # some vectors [k]; the gradient is 257 of them
    assert growth <= vectors
    assert large.output_size_in_bytes - small.output_size_in_bytes >= 256 * 4 * 131_072
