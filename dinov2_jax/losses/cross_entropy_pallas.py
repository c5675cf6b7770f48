"""Cross-entropy of students' rows with the targets of the same rows as Pallas kernels for TPU.

Logits of student and teacher are made a tile at a time, as [prototypes, rows], and used at once: no
number of [n, k] leaves the chip. See `block_cross_entropy`, which is the same in plain JAX.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike

from dinov2_jax.losses import pallas_tiles
from dinov2_jax.losses.pallas_tiles import (
    NOWHERE,
    TILE,
    WIDE,
    accumulate,
    dot,
    fill,
    tiles,
)
from dinov2_jax.models.tpu_tiles import LANES, MIB, round_up

MAX_CALLS = 8  # each reads all prototypes again, as plain blocks do several times
Prototypes = tuple[Array, Array]  # directions [k, d] and the factors [k, 1] that make vectors


def row_sums(
    features: Array,
    prototypes: Prototypes,
    target_features: Array,
    target_prototypes: Prototypes,
    target_rows: tuple[Array, Array],
    log_scale: Array,
    lowest: ArrayLike,
    temps: tuple[ArrayLike, ArrayLike],
) -> tuple[Array, ...]:
    """What `block_cross_entropy` needs of each row, for targets of the same rows.

    Args:
      features, prototypes: the student's; features `[n, d]` in the compute type.
      target_features, target_prototypes: the teacher's.
      target_rows: their largest logit and the log of what normalises them, `[n]` each.
      log_scale: of the targets, `[k]`.
      lowest: how far below their row's largest, as a negative number, logits have targets.
      temps: of student and teacher.

    Returns:
      `[n]` each, of x = logits / temp less its largest value: that value, the sums of exp(x),
      exp(x) * x, targets, and targets * x.
    """
    (n, d), k = features.shape, log_scale.shape[0]
    (size_n, tile_n), (size_k, tile_k) = tiles(n, largest=WIDE), tiles(k)
    row_specs, k_specs = _specs(d, tile_n, tile_k, lambda j, i: j, lambda j, i: i)
    out = pl.pallas_call(
        _sums_kernel,
        grid=(size_n // tile_n, size_k // tile_k),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *row_specs, *k_specs],
        out_specs=pl.BlockSpec((8, tile_n), lambda j, i: (0, j)),
        out_shape=jax.ShapeDtypeStruct((8, size_n), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=pallas_tiles.vmem_bytes(d) + 16 * MIB,
        ),
        cost_estimate=pallas_tiles.cost(
            size_n, size_k, d, products=2, exps=2, num_bytes=size_n // tile_n * 2 * 4 * size_k * d
        ),
        interpret=pallas_tiles.interpret(),
        name="prototypes_cross_entropy",
    )(
        pallas_tiles.scalars(1 / temps[0], 1 / temps[1], lowest),
        *_row_arrays(size_n, features, target_features, target_rows),
        *_prototype_arrays(size_k, prototypes, target_prototypes, log_scale),
    )
    return tuple(out[:5, :n])


def _sums_kernel(scalars_ref, z_ref, zt_ref, rows_ref, *refs):
    *prototype_refs, out_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        first = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 0) == 0
        out_ref[...] = jnp.where(first, -NOWHERE, 0.0)

    _, z, targets = _tile(scalars_ref, z_ref, zt_ref, rows_ref, *prototype_refs)
    old_max, exp_sum, exp_x_sum, mass, target_x_sum = (out_ref[i : i + 1] for i in range(5))
    row_max = jnp.maximum(old_max, z.max(axis=0, keepdims=True))
    shift = old_max - row_max
    decay, x = jnp.exp(shift), z - row_max
    exp_x = jnp.exp(x)
    out_ref[0:1] = row_max
    out_ref[1:2] = decay * exp_sum + _sum(exp_x)
    out_ref[2:3] = decay * (exp_x_sum + shift * exp_sum) + _sum(exp_x * x)
    out_ref[3:4] = mass + _sum(targets)
    out_ref[4:5] = target_x_sum + shift * mass + _sum(targets * x)


def _sum(x: Array) -> Array:
    return x.sum(axis=0, keepdims=True)


def fits(n: int, d: int) -> bool:
    """Whether the vector memory of the TPU in use lets both kernels take n rows in a few calls."""
    if not pltpu.is_tpu_device():
        return True
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    has_sums = pallas_tiles.vmem_bytes(d) + 16 * MIB <= capacity
    return has_sums and n <= MAX_CALLS * rows_that_fit(d)


def rows_that_fit(d: int) -> int:
    """Rows of one call of the gradients' kernel, by the vector memory of the TPU in use; or 0.

    The features' gradient lies in it as a whole, twice.
    """
    if not pltpu.is_tpu_device():
        return 2**20
    free = pltpu.get_tpu_info().vmem_capacity_bytes - pallas_tiles.vmem_bytes(d)
    return max(0, free // (8 * round_up(d, LANES)) // TILE * TILE)


def gradients(
    features: Array,
    prototypes: Prototypes,
    target_features: Array,
    target_prototypes: Prototypes,
    target_rows: tuple[Array, Array],
    log_scale: Array,
    lowest: ArrayLike,
    temps: tuple[ArrayLike, ArrayLike],
    *,
    norms: Array,
    log_sum: Array,
    mass: Array,
    cotangent: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """Gradients for the features `[n, d]`, and for directions `[k, d]` and lengths `[k, 1]`.

    Those of the vectors become those of directions and lengths as soon as they are whole, tile by
    tile, as `blocks.Prototypes.to_parameters` has it: nothing else `[k, d]` is written, unless the
    rows are too many for one call: then they come in pieces, and their sum is kept beside it.

    Args:
      features .. temps: as in `row_sums`.
      norms: of the student's directions, `[k, 1]`.
      log_sum: log of sum_k exp(logits / temp), `[n]`.
      mass: the targets' sums, `[n]`.
      cotangent: of the rows' cross-entropy, `[n]`.
    """
    n, d = features.shape
    num_calls = -(-n // rows_that_fit(d))
    size = -(-n // num_calls)
    shared = prototypes, target_prototypes, log_scale, lowest, norms, temps
    row_max, target_log_sum = target_rows
    slope = cotangent / temps[0]
    vectors = row_max, target_log_sum, log_sum, mass, slope
    if num_calls == 1:
        grad_features, *grads = _gradients(features, target_features, *vectors, *shared)
        return grad_features, tuple(grads)

    def add_piece(grads, piece):
        grad_features, *more = _gradients(*piece, *shared)
        return jax.tree.map(jnp.add, grads, tuple(more)), grad_features

    fillings = 0.0, 0.0, 0.0, NOWHERE, 0.0, 0.0, 0.0  # a slope of 0 and a target of 0
    pieces = [
        fill(x, num_calls * size, value).reshape(num_calls, size, *x.shape[1:])
        for x, value in zip((features, target_features, *vectors), fillings, strict=True)
    ]
    grads, grad_features = jax.lax.scan(
        add_piece, (jnp.zeros(prototypes[0].shape), jnp.zeros(norms.shape)), pieces
    )
    return grad_features.reshape(-1, d)[:n], grads


def _gradients(
    features,
    target_features,
    row_max,
    target_log_sum,
    log_sum,
    mass,
    slope,
    prototypes,
    target_prototypes,
    log_scale,
    lowest,
    norms,
    temps,
) -> tuple[Array, Array, Array]:
    """By one call of the kernel; `slope` is the cotangent over the student's temperature."""
    (n, d), k = features.shape, log_scale.shape[0]
    (size_n, tile_n), (size_k, tile_k) = tiles(n), tiles(k, multiple=2)
    halves = min(2, size_k // tile_k)  # for chips whose device has two cores
    steps = size_k // tile_k // halves

    def prototype_of(half, i, j):
        return half * steps + i

    row_specs, k_specs = _specs(d, tile_n, tile_k, lambda half, i, j: j, prototype_of)
    tile = k_specs[0]
    row = pl.BlockSpec((8, tile_k), lambda *at: (0, prototype_of(*at)))
    features_bytes = size_n * d * (2 * features.dtype.itemsize * halves * steps + 4 * halves)
    grad_features, grad_directions, grad_lengths = pl.pallas_call(
        functools.partial(_gradient_kernel, tile_n=tile_n),
        grid=(halves, steps, size_n // tile_n),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *row_specs, *k_specs],
        out_specs=[
            pl.BlockSpec((1, size_n, d), lambda half, i, j: (half, 0, 0)),
            tile,
            row,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((halves, size_n, d), jnp.float32),
            jax.ShapeDtypeStruct((size_k, d), jnp.float32),
            jax.ShapeDtypeStruct((8, size_k), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=8 * size_n * round_up(d, LANES) + pallas_tiles.vmem_bytes(d),
        ),
        cost_estimate=pallas_tiles.cost(
            size_n, size_k, d, products=4, exps=2, num_bytes=features_bytes + 3 * 4 * size_k * d
        ),
        interpret=pallas_tiles.interpret(),
        name="prototypes_gradients",
    )(
        pallas_tiles.scalars(1 / temps[0], 1 / temps[1], lowest),
        *_row_arrays(
            size_n, features, target_features, (row_max, target_log_sum), log_sum, mass, slope
        ),
        *_prototype_arrays(size_k, prototypes, target_prototypes, log_scale, (norms, 1.0)),
    )
    return grad_features.sum(axis=0)[:n], grad_directions[:k], grad_lengths[0, :k, None]


def _gradient_kernel(scalars_ref, z_ref, zt_ref, rows_ref, *refs, tile_n: int):
    *prototype_refs, dz_ref, dv_ref, dg_ref = refs
    weights, z, targets = _tile(scalars_ref, z_ref, zt_ref, rows_ref, *prototype_refs)
    log_sum, mass, factor = (rows_ref[i : i + 1] for i in (2, 3, 4))
    slope = ((mass * jnp.exp(z - log_sum) - targets) * factor).astype(z_ref.dtype)
    step, row = pl.program_id(1), pl.program_id(2)
    accumulate(dv_ref, dot(slope, z_ref[...], 1, 0), row == 0)
    rows = pl.ds(pl.multiple_of(row * tile_n, LANES), tile_n)
    accumulate(dz_ref.at[0, rows], dot(slope, weights, 0, 0), step == 0)

    @pl.when(row == pl.num_programs(2) - 1)
    def _():
        v_ref, _, columns_ref = prototype_refs
        scale, *_, norms = pallas_tiles.columns(columns_ref, 5)
        per_length = (dv_ref[...] * v_ref[...]).sum(axis=1, keepdims=True) / norms
        dv_ref[...] = (dv_ref[...] - v_ref[...] * (per_length / norms)) * scale
        dg_ref[...] = jnp.broadcast_to(per_length, (per_length.shape[0], LANES)).T[:8]


def _tile(scalars_ref, z_ref, zt_ref, rows_ref, v_ref, vt_ref, columns_ref):
    """Of a tile the student's prototypes, and its logits over the temperature and the targets."""
    scale, target_scale, log_scale, hidden = pallas_tiles.columns(columns_ref, 4)
    weights = (v_ref[...] * scale).astype(z_ref.dtype)
    target_weights = (vt_ref[...] * target_scale).astype(zt_ref.dtype)
    z = dot(weights, z_ref[...], 1, 1) * scalars_ref[0, 0] - hidden  # [k, n]
    shifted = dot(target_weights, zt_ref[...], 1, 1) - rows_ref[0:1]
    targets = jnp.exp(shifted * scalars_ref[0, 1] + log_scale - rows_ref[1:2])
    return weights, z, jnp.where(shifted < scalars_ref[0, 2], 0.0, targets)


def _specs(d: int, tile_n: int, tile_k: int, row_of, prototype_of):
    """Blocks of the arrays of `_row_arrays` and of `_prototype_arrays`."""
    rows = pl.BlockSpec((tile_n, d), lambda *at: (row_of(*at), 0))
    prototypes = pl.BlockSpec((tile_k, d), lambda *at: (prototype_of(*at), 0))
    return (
        (rows, rows, pl.BlockSpec((8, tile_n), lambda *at: (0, row_of(*at)))),
        (prototypes, prototypes, pl.BlockSpec((8, tile_k), lambda *at: (0, prototype_of(*at)))),
    )


def _row_arrays(size: int, features: Array, target_features: Array, target_rows, *vectors: Array):
    """Padded features, and vectors in the rows of `[8, size]`. Padding has targets of 0."""
    row_max, log_sum = target_rows
    packed = pallas_tiles.pack(size, row_max, (log_sum, NOWHERE), *vectors)
    return fill(features, size), fill(target_features, size), packed


def _prototype_arrays(size: int, prototypes: Prototypes, targets: Prototypes, log_scale, *vectors):
    """Padded directions, and in `[8, size]` factors, the targets' log scale, what hides padding."""
    hidden = jnp.zeros_like(log_scale), NOWHERE
    packed = pallas_tiles.pack(
        size, prototypes[1], targets[1], (log_scale, -NOWHERE), hidden, *vectors
    )
    return fill(prototypes[0], size), fill(targets[0], size), packed
