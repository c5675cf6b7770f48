"""Sums over Sinkhorn-Knopp's matrix as a Pallas kernel for TPU, which never writes it down.

The matrix is exp((logits - row_max) / temp). A kernel makes a tile of logits on the matrix unit and
sums it at once; rows and prototypes, `[n, d]` and `[k, d]` in the compute type, change places for
the other direction.
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
from dinov2_jax.losses.pallas_tiles import NOWHERE, accumulate, fill

LOG2_E = math.log2(math.e)  # powers of two are what the hardware has


def largest_logits(rows: Array, weight: Array) -> Array:
    """The largest logit of each row: `[n, d]` and `[k, d]` to `[n]`."""
    nothing = jnp.zeros(weight.shape[0])
    return _reduce(weight, rows, nothing, nothing, None, 1.0, op="max")


def sum_rows(rows: Array, weight: Array, row_max: Array, v: Array, temp: ArrayLike) -> Array:
    """sum_n v_n * exp((logits_nk - row_max_n) / temp), `[k]`; `row_max` and `v` are `[n]`."""
    return _reduce(rows, weight, row_max, v, None, temp, op="sum")


def sum_prototypes(rows: Array, weight: Array, row_max: Array, u: Array, temp: ArrayLike) -> Array:
    """sum_k u_k * exp((logits_nk - row_max_n) / temp), `[n]`; `u` is `[k]`."""
    return _reduce(weight, rows, jnp.zeros_like(u), u, row_max, temp, op="sum")


def _reduce(a, b, a_shift, factor, b_shift, temp, *, op: str) -> Array:
    """Over i, of factor_i * exp((<a_i, b_j> - a_shift_i - b_shift_j) / temp); or of <a_i, b_j>."""
    (size_a, tile_a), (size_b, tile_b) = (
        pallas_tiles.tiles(a.shape[0]),
        pallas_tiles.tiles(b.shape[0]),
    )
    has_shift = b_shift is not None
    row = fill(b_shift if has_shift else jnp.zeros(b.shape[0]), size_b)[None]
    grid = size_b // tile_b, size_a // tile_a
    d = a.shape[1]
    out = pl.pallas_call(
        functools.partial(_reduce_kernel, op=op, has_shift=has_shift),
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tile_a, d), lambda j, i: (i, 0)),
            pl.BlockSpec((tile_b, d), lambda j, i: (j, 0)),
            *[pl.BlockSpec((tile_a, 1), lambda j, i: (i, 0))] * 2,
            pl.BlockSpec((1, tile_b), lambda j, i: (0, j)),
        ],
        out_specs=pl.BlockSpec((1, tile_b), lambda j, i: (0, j)),
        out_shape=jax.ShapeDtypeStruct((1, size_b), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pallas_tiles.cost(
            size_a, size_b, d, products=1, exps=op == "sum", num_bytes=grid[0] * a.nbytes + b.nbytes
        ),
        interpret=pallas_tiles.interpret(),
        name=f"prototypes_{op}",
    )(
        pallas_tiles.scalars(LOG2_E / temp),
        fill(a, size_a),
        fill(b, size_b),
        fill(a_shift, size_a, NOWHERE)[:, None],
        fill(factor, size_a)[:, None],
        row,
    )
    return out[0, : b.shape[0]]


def _reduce_kernel(
    scale_ref, a_ref, b_ref, shift_ref, factor_ref, row_ref, out_ref, *, op, has_shift
):
    x = pallas_tiles.dot(a_ref[...], b_ref[...], 1, 1) - shift_ref[...]
    if has_shift:
        x -= row_ref[...]
    if op == "max":
        new, join = x.max(axis=0, keepdims=True), jnp.maximum
    else:
        x = jnp.exp2(x * scale_ref[0, 0]) * factor_ref[...]
        new, join = x.sum(axis=0, keepdims=True), jnp.add
    accumulate(out_ref, new, pl.program_id(1) == 0, join)
