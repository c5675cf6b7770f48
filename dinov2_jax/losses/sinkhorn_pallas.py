"""Sums over Sinkhorn-Knopp's matrix as Pallas kernels for TPU, which never write it down.

The matrix is exp((logits - row_max) / temp), and 0 below `centering.lowest_logit`. A kernel makes a
tile of logits on the matrix unit and sums it at once. Rows are `[n, d]` in the compute type,
prototypes their directions `[k, d]` and the factors `[k, 1]` that make vectors of them, in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike

from dinov2_jax.losses import pallas_tiles
from dinov2_jax.losses.centering import lowest_logit
from dinov2_jax.losses.pallas_tiles import NOWHERE, WIDE, accumulate, dot, fill, tiles

LOG2_E = math.log2(math.e)  # powers of two are what the hardware has


def largest_logits(rows: Array, prototypes: tuple[Array, Array]) -> Array:
    """The largest logit of each row, `[n]`."""
    unused = jnp.zeros(prototypes[1].shape[0])
    return _reduce_prototypes("max", rows, prototypes, jnp.zeros(rows.shape[0]), unused, 1.0)


def sum_prototypes(
    rows: Array, prototypes: tuple[Array, Array], row_max: Array, u: Array, temp: ArrayLike
) -> Array:
    """sum_k u_k * exp((logits_nk - row_max_n) / temp), `[n]`; `u` is `[k]`."""
    return _reduce_prototypes("sum", rows, prototypes, row_max, u, temp)


def _reduce_prototypes(op, rows, prototypes, row_max, u, temp) -> Array:
    (n, d), k = rows.shape, u.shape[0]
    (size_n, tile_n), (size_k, tile_k) = tiles(n, largest=WIDE), tiles(k)
    grid = size_n // tile_n, size_k // tile_k
    row = pl.BlockSpec((1, tile_n), lambda j, i: (0, j))
    directions, factors = prototypes
    hidden = jnp.zeros(k), NOWHERE
    out = pl.pallas_call(
        functools.partial(_prototypes_kernel, op=op),
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tile_k, d), lambda j, i: (i, 0)),
            pl.BlockSpec((8, tile_k), lambda j, i: (0, i)),
            pl.BlockSpec((tile_n, d), lambda j, i: (j, 0)),
            row,
        ],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct((1, size_n), jnp.float32),
        name=f"prototypes_{op}",
        **_settings(size_n, size_k, d, num_bytes=grid[0] * directions.nbytes + rows.nbytes),
    )(
        _scalars(temp),
        fill(directions, size_k),
        pallas_tiles.pack(size_k, factors, hidden, u),
        fill(rows, size_n),
        fill(row_max, size_n)[None],
    )
    return out[0, :n]


def _prototypes_kernel(scalars_ref, directions_ref, columns_ref, z_ref, max_ref, out_ref, *, op):
    factor, hidden, u = pallas_tiles.columns(columns_ref, 3)
    weights = (directions_ref[...] * factor).astype(z_ref.dtype)
    x = dot(weights, z_ref[...], 1, 1) - hidden - max_ref[...]
    if op == "max":
        new, join = x.max(axis=0, keepdims=True), jnp.maximum
    else:
        x = _powers(x, scalars_ref) * u
        new, join = x.sum(axis=0, keepdims=True), jnp.add
    accumulate(out_ref, new, pl.program_id(1) == 0, join)


def sum_rows(
    rows: Array, prototypes: tuple[Array, Array], row_max: Array, v: Array, temp: ArrayLike
) -> Array:
    """sum_n v_n * exp((logits_nk - row_max_n) / temp), `[k]`; `row_max` and `v` are `[n]`."""
    (n, d), k = rows.shape, prototypes[0].shape[0]
    (size_n, tile_n), (size_k, tile_k) = tiles(n), tiles(k)
    grid = size_k // tile_k, size_n // tile_n
    directions, factors = prototypes
    out = pl.pallas_call(
        _rows_kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tile_n, d), lambda j, i: (i, 0)),
            pl.BlockSpec((8, tile_n), lambda j, i: (0, i)),
            pl.BlockSpec((tile_k, d), lambda j, i: (j, 0)),
            pl.BlockSpec((8, tile_k), lambda j, i: (0, j)),
        ],
        out_specs=pl.BlockSpec((1, tile_k), lambda j, i: (0, j)),
        out_shape=jax.ShapeDtypeStruct((1, size_k), jnp.float32),
        name="prototypes_sum_rows",
        **_settings(size_n, size_k, d, num_bytes=grid[0] * rows.nbytes + directions.nbytes),
    )(
        _scalars(temp),
        fill(rows, size_n),
        pallas_tiles.pack(size_n, (row_max, NOWHERE), v),
        fill(directions, size_k),
        pallas_tiles.pack(size_k, factors),
    )
    return out[0, :k]


def _rows_kernel(scalars_ref, z_ref, rows_ref, directions_ref, columns_ref, out_ref):
    row_max, v = pallas_tiles.columns(rows_ref, 2)
    (factor,) = pallas_tiles.columns(columns_ref, 1)
    weights = (directions_ref[...] * factor).astype(z_ref.dtype)
    x = dot(z_ref[...], weights, 1, 1) - row_max
    x = _powers(x, scalars_ref) * v
    accumulate(out_ref, x.sum(axis=0, keepdims=True), pl.program_id(1) == 0)


def _scalars(temp: ArrayLike) -> Array:
    return pallas_tiles.scalars(LOG2_E / temp, lowest_logit(temp))


def _powers(x: Array, scalars_ref) -> Array:
    return jnp.where(x < scalars_ref[0, 1], 0.0, jnp.exp2(x * scalars_ref[0, 0]))


def _settings(n: int, k: int, d: int, *, num_bytes: int) -> dict:
    return dict(
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=pallas_tiles.vmem_bytes(d),
        ),
        cost_estimate=pallas_tiles.cost(n, k, d, products=1, exps=1, num_bytes=num_bytes),
        interpret=pallas_tiles.interpret(),
    )
