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
from dinov2_jax.losses.pallas_tiles import LANES, MIB, NOWHERE, accumulate, dot, fill, tiles


def row_sums(
    features: Array,
    weight: Array,
    target_features: Array,
    target_weight: Array,
    target_rows: tuple[Array, Array],
    log_scale: Array,
    temps: tuple[ArrayLike, ArrayLike],
) -> tuple[Array, ...]:
    """What `block_cross_entropy` needs of each row, for targets of the same rows.

    Args:
      features, weight: the student's, `[n, d]` and `[k, d]`.
      target_features, target_weight: the teacher's.
      target_rows: their largest logit and the log of what normalises them, `[n]` each.
      log_scale: of the targets, `[k]`.
      temps: of student and teacher.

    Returns:
      `[n]` each, of x = logits / temp less its largest value: that value, the sums of exp(x),
      exp(x) * x, targets, and targets * x.
    """
    n, d = features.shape
    (size_n, tile_n), (size_k, tile_k) = tiles(n), tiles(weight.shape[0])
    row_specs, k_specs = _specs(d, tile_n, tile_k, lambda j, i: j, lambda j, i: i)
    out = pl.pallas_call(
        _sums_kernel,
        grid=(size_n // tile_n, size_k // tile_k),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *row_specs, *k_specs],
        out_specs=pl.BlockSpec((8, tile_n), lambda j, i: (0, j)),
        out_shape=jax.ShapeDtypeStruct((8, size_n), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=32 * MIB
        ),
        cost_estimate=pallas_tiles.cost(
            size_n, size_k, d, products=2, exps=2, num_bytes=2 * weight.nbytes * size_n // tile_n
        ),
        interpret=pallas_tiles.interpret(),
        name="prototypes_cross_entropy",
    )(
        pallas_tiles.scalars(1 / temps[0], 1 / temps[1]),
        *_row_arrays(size_n, features, target_features, target_rows),
        *_prototype_arrays(size_k, weight, target_weight, log_scale),
    )
    return tuple(out[:5, :n])


def _sums_kernel(
    inverse_temps, z_ref, zt_ref, rows_ref, w_ref, wt_ref, log_scale_ref, hidden_ref, out_ref
):
    @pl.when(pl.program_id(1) == 0)
    def _():
        first = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 0) == 0
        out_ref[...] = jnp.where(first, -NOWHERE, 0.0)

    z, targets = _tile(
        inverse_temps, z_ref, zt_ref, rows_ref, w_ref, wt_ref, log_scale_ref, hidden_ref
    )
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
    """Whether `gradients` of n rows fits the vector memory of the TPU in use."""
    if not pltpu.is_tpu_device():
        return True
    return _gradient_vmem_bytes(n, d) <= pltpu.get_tpu_info().vmem_capacity_bytes


def _gradient_vmem_bytes(n: int, d: int) -> int:
    return 2 * 4 * tiles(n)[0] * max(d, LANES) + 12 * MIB  # the features' gradient lies in it


def gradients(
    features: Array,
    weight: Array,
    target_features: Array,
    target_weight: Array,
    target_rows: tuple[Array, Array],
    log_scale: Array,
    temps: tuple[ArrayLike, ArrayLike],
    *,
    log_sum: Array,
    mass: Array,
    cotangent: Array,
) -> tuple[Array, Array]:
    """Gradients for `features [n, d]` and `weight [k, d]`, float32.

    Args:
      features .. temps: as in `row_sums`.
      log_sum: log of sum_k exp(logits / temp), `[n]`.
      mass: the targets' sums, `[n]`.
      cotangent: of the rows' cross-entropy, `[n]`.
    """
    (n, d), k = features.shape, weight.shape[0]
    (size_n, tile_n), (size_k, tile_k) = tiles(n), tiles(k, multiple=2)
    halves = 2 if size_k // tile_k % 2 == 0 else 1  # for chips whose device has two cores
    steps = size_k // tile_k // halves
    row_specs, k_specs = _specs(
        d, tile_n, tile_k, lambda half, i, j: j, lambda half, i, j: half * steps + i
    )
    grad_features, grad_weight = pl.pallas_call(
        functools.partial(_gradient_kernel, tile_n=tile_n),
        grid=(halves, steps, size_n // tile_n),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *row_specs, *k_specs],
        out_specs=[
            pl.BlockSpec((1, size_n, d), lambda half, i, j: (half, 0, 0)),
            pl.BlockSpec((tile_k, d), lambda half, i, j: (half * steps + i, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((halves, size_n, d), jnp.float32),
            jax.ShapeDtypeStruct((size_k, d), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_gradient_vmem_bytes(n, d),
        ),
        cost_estimate=pallas_tiles.cost(
            size_n, size_k, d, products=4, exps=2, num_bytes=2 * features.nbytes * size_k // tile_k
        ),
        interpret=pallas_tiles.interpret(),
        name="prototypes_gradients",
    )(
        pallas_tiles.scalars(1 / temps[0], 1 / temps[1]),
        *_row_arrays(
            size_n, features, target_features, target_rows, log_sum, mass, cotangent / temps[0]
        ),
        *_prototype_arrays(size_k, weight, target_weight, log_scale),
    )
    return grad_features.sum(axis=0)[:n], grad_weight[:k]


def _gradient_kernel(
    inverse_temps,
    z_ref,
    zt_ref,
    rows_ref,
    w_ref,
    wt_ref,
    log_scale_ref,
    hidden_ref,
    dz_ref,
    dw_ref,
    *,
    tile_n,
):
    z, targets = _tile(
        inverse_temps, z_ref, zt_ref, rows_ref, w_ref, wt_ref, log_scale_ref, hidden_ref
    )
    log_sum, mass, factor = (rows_ref[i : i + 1] for i in (2, 3, 4))
    slope = ((mass * jnp.exp(z - log_sum) - targets) * factor).astype(w_ref.dtype)
    step, row = pl.program_id(1), pl.program_id(2)
    accumulate(dw_ref, dot(slope, z_ref[...], 1, 0), row == 0)
    rows = pl.ds(pl.multiple_of(row * tile_n, LANES), tile_n)
    accumulate(dz_ref.at[0, rows], dot(slope, w_ref[...], 0, 0), step == 0)


def _tile(inverse_temps, z_ref, zt_ref, rows_ref, w_ref, wt_ref, log_scale_ref, hidden_ref):
    """The student's logits over the temperature, and the targets, `[k, n]` of a tile."""
    z = dot(w_ref[...], z_ref[...], 1, 1) * inverse_temps[0, 0] - hidden_ref[...]
    logits = dot(wt_ref[...], zt_ref[...], 1, 1)
    shifted = (logits - rows_ref[0:1]) * inverse_temps[0, 1]
    return z, jnp.exp(shifted + log_scale_ref[...] - rows_ref[1:2])


def _specs(d: int, tile_n: int, tile_k: int, row_of, prototype_of):
    """Blocks of the arrays of `_row_arrays` and of `_prototype_arrays`."""
    rows = pl.BlockSpec((tile_n, d), lambda *at: (row_of(*at), 0))
    prototypes = pl.BlockSpec((tile_k, d), lambda *at: (prototype_of(*at), 0))
    column = pl.BlockSpec((tile_k, 1), lambda *at: (prototype_of(*at), 0))
    return (
        (rows, rows, pl.BlockSpec((8, tile_n), lambda *at: (0, row_of(*at)))),
        (prototypes, prototypes, column, column),
    )


def _row_arrays(
    size: int,
    features: Array,
    target_features: Array,
    target_rows: tuple[Array, Array],
    *vectors: Array,
):
    """Padded; the vectors are the rows of an array `[8, size]`. Padding has targets of 0."""
    row_max, log_sum = target_rows
    rows = [fill(row_max, size), fill(log_sum, size, NOWHERE), *(fill(x, size) for x in vectors)]
    rows += [jnp.zeros(size)] * (8 - len(rows))
    return fill(features, size), fill(target_features, size), jnp.stack(rows)


def _prototype_arrays(size: int, weight: Array, target_weight: Array, log_scale: Array):
    """Padded; the vectors are the log scale, and what hides padding: `[size, 1]`."""
    columns = fill(log_scale, size, -NOWHERE), fill(jnp.zeros_like(log_scale), size, NOWHERE)
    return fill(weight, size), fill(target_weight, size), *(x[:, None] for x in columns)
