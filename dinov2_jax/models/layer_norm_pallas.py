"""Layer normalisation for TPU as two Pallas kernels, each of which reads the tokens once.

XLA reads them once for the mean, once for the variance and once for the result, and as often again
for the gradient.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dinov2_jax.models.tpu_tiles import LANES, MIB
from dinov2_jax.sharding import on_each_device, platform

EPSILON = 1e-6
MAX_ROWS = 320  # tokens of a block; more take several blocks of 256
TEMPORARIES = 3  # float32 arrays of a block's shape that are in memory at once, at most


def block_rows(n: int) -> int:
    """Tokens of a block, of an image's n."""
    return n if n <= MAX_ROWS else 256


def vmem_bytes(blocks: Sequence[tuple[tuple[int, ...], Any]]) -> int:
    """Vector memory for blocks of such shapes and types: each twice, and what is computed."""

    def size(shape, itemsize: int) -> int:
        rows = 32 // itemsize  # of a tile
        return itemsize * pl.cdiv(shape[-2], rows) * rows * pl.cdiv(shape[-1], LANES) * LANES

    moved = sum(size(shape, jnp.dtype(dtype).itemsize) for shape, dtype in blocks)
    return 2 * moved + TEMPORARIES * max(size(shape, 4) for shape, _ in blocks)


def call_settings(*, grid: tuple[int, ...], blocks: Sequence, num_bytes: int) -> dict:
    """Of a call whose steps, in any order, take blocks of such shapes and types."""
    size = max(math.prod(shape) for shape, _ in blocks)
    return dict(
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * len(grid),
            vmem_limit_bytes=max(16 * MIB, vmem_bytes(blocks)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=8 * size * math.prod(grid), transcendentals=0, bytes_accessed=num_bytes
        ),
        interpret=platform() != "tpu",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype) -> jax.Array:
    """Layer normalisation of `x` `[b, n, d]`, times `scale` and plus `bias`, each `[1, d]`."""

    def kernel(x, scale, bias):
        plan = _Plan(x)
        return pl.pallas_call(
            _forward_kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, dtype),
            in_specs=[plan.tokens, plan.vector, plan.vector],
            out_specs=plan.tokens,
            name="layer_norm_forward",
            **plan.settings((x.dtype, dtype), num_vectors=2),
        )(x, scale, bias)

    return on_each_device(kernel, x, replicated=(scale, bias))


def _backward(dtype, kept, grad):
    x, scale = kept

    def kernel(x, grad, scale):
        plan = _Plan(x)
        sums = jax.ShapeDtypeStruct((*plan.grid, 1, x.shape[-1]), jnp.float32)
        return pl.pallas_call(
            functools.partial(_backward_kernel, num_rows=x.shape[1]),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums],
            in_specs=[plan.tokens, plan.tokens, plan.vector],
            out_specs=[plan.tokens, plan.sums, plan.sums],
            name="layer_norm_backward",
            **plan.settings((x.dtype, grad.dtype, x.dtype), num_vectors=3),
        )(x, grad, scale)

    dx, dscale, dbias = on_each_device(kernel, x, grad, replicated=(scale,))
    return dx, dscale.sum(axis=(0, 1)), dbias.sum(axis=(0, 1))


normalize.defvjp(
    lambda x, scale, bias, dtype: (normalize(x, scale, bias, dtype), (x, scale)), _backward
)


class _Plan:
    """Blocks of one image's tokens, all of them or 256 at a time; the last may reach beyond."""

    def __init__(self, x: jax.Array):
        b, n, d = x.shape
        rows = block_rows(n)
        self.grid = (b, pl.cdiv(n, rows))
        self.tokens = pl.BlockSpec((1, rows, d), lambda image, step: (image, step, 0))
        self.vector = pl.BlockSpec((1, d), lambda image, step: (0, 0))
        self.sums = pl.BlockSpec((1, 1, 1, d), lambda image, step: (image, step, 0, 0))
        self._size = x.size

    def settings(self, dtypes: Sequence, *, num_vectors: int) -> dict:
        """Of a call on arrays as large as the tokens, of such types, and on vectors."""
        blocks = [(self.tokens.block_shape, dtype) for dtype in dtypes]
        blocks += [(self.vector.block_shape, jnp.float32)] * num_vectors
        num_bytes = sum(self._size * jnp.dtype(dtype).itemsize for dtype in dtypes)
        settings = call_settings(grid=self.grid, blocks=blocks, num_bytes=num_bytes)
        return dict(grid=self.grid) | settings


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens without mean and with variance 1, and the factor for it."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + EPSILON)
    return centred * factor, factor


def zero_beyond(x: jax.Array, *, first_row, num_rows: int) -> jax.Array:
    """A block `[rows, d]` as float32, with zeros for what lies beyond the last of `num_rows`."""
    x = x.astype(jnp.float32)
    if num_rows % x.shape[0] == 0:
        return x
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + first_row
    return jnp.where(row < num_rows, x, 0.0)


def gradients(x, grad, scale, *, first_row, num_rows: int):
    """Of tokens `[rows, d]`, the first of which is `first_row` of `num_rows`.

    Returns:
      The gradients, float32, of the tokens and of scale and bias, `[1, d]` each.
    """
    x, grad = (zero_beyond(a, first_row=first_row, num_rows=num_rows) for a in (x, grad))
    normal, factor = statistics(x)
    dscale = (grad * normal).sum(axis=0, keepdims=True)
    dbias = grad.sum(axis=0, keepdims=True)
    grad = grad * scale
    along = (grad * normal).mean(axis=-1, keepdims=True)
    return (grad - grad.mean(axis=-1, keepdims=True) - normal * along) * factor, dscale, dbias


def _forward_kernel(x_ref, scale_ref, bias_ref, out_ref):
    normal, _ = statistics(x_ref[0])
    out_ref[0] = (normal * scale_ref[...] + bias_ref[...]).astype(out_ref.dtype)


def _backward_kernel(x_ref, grad_ref, scale_ref, dx_ref, dscale_ref, dbias_ref, *, num_rows: int):
    x = x_ref[0]
    dx, dscale_ref[0, 0], dbias_ref[0, 0] = gradients(
        x,
        grad_ref[0],
        scale_ref[...],
        first_row=pl.program_id(1) * x.shape[0],
        num_rows=num_rows,
    )
    dx_ref[0] = dx.astype(dx_ref.dtype)
