"""Stochastic depth of a residual branch for TPU: Pallas kernels that move no image twice.

`fork` normalises the tokens of the kept images where they lie, and `join` adds their residuals
where they belong; backwards each does what the other does forwards. A kernel's step takes an image
by its number, which the grid reads ahead; dropped images are read only where the stream passes.

Images lie group-major, `[(s q), n, d]`; `order` `[s, q]` has the images of each group by number,
those first that are kept.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dinov2_jax.models.layer_norm_pallas import (
    block_rows,
    call_settings,
    gradients,
    statistics,
    zero_beyond,
)
from dinov2_jax.sharding import on_each_device


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fork(x, scale, bias, order, kept: int, dtype) -> tuple[jax.Array, jax.Array]:
    """The stream of tokens, and the kept images' normalised.

    Args:
      x: tokens `[(s q), n, d]`.
      scale, bias: of the layer normalisation, `[1, d]`.
      order: int `[s, q]`.
      kept: images of each group.
      dtype: of the normalised tokens.

    Returns:
      `x` itself, whose gradient takes up that of the normalised tokens in one pass, and
      `[(s kept), n, d]`.
    """

    def kernel(order, x, scale, bias):
        plan = _Plan(order, x, kept, grid_of="kept")
        normal = jax.ShapeDtypeStruct((kept * order.shape[0], *x.shape[1:]), dtype)
        return plan.call(
            _fork_kernel,
            name="drop_path_fork",
            operands=[(x, plan.stream), (scale, plan.vector), (bias, plan.vector)],
            results=[(normal, plan.branch)],
        )

    return x, on_each_device(kernel, order, x, replicated=(scale, bias))


def _fork_backward(kept, dtype, saved, grads):
    x, scale, order = saved

    def kernel(order, x, through, grad, scale):
        plan = _Plan(order, x, kept, grid_of="kept")
        return plan.call(
            functools.partial(_fork_backward_kernel, num_rows=x.shape[1]),
            name="drop_path_fork_backward",
            in_place=1,  # nothing else needs it; what `join` adds to is needed, and would be copied
            operands=[
                (x, plan.stream),
                (through, plan.stream),
                (grad, plan.branch),
                (scale, plan.vector),
            ],
            results=[(x, plan.stream), (plan.sums_shape, plan.sums), (plan.sums_shape, plan.sums)],
        )

    dx, dscale, dbias = on_each_device(kernel, order, x, *grads, replicated=(scale,))
    return dx, dscale.sum(axis=(0, 1)), dbias.sum(axis=(0, 1)), None


fork.defvjp(
    lambda x, scale, bias, order, kept, dtype: (
        fork(x, scale, bias, order, kept, dtype),
        (x, scale, order),
    ),
    _fork_backward,
)


@jax.custom_vjp
def join(x, residual, bias, gamma, order) -> jax.Array:
    """Adds the kept images' residuals, times `gamma`, to the stream; the sum is float32.

    Args:
      x: tokens `[(s q), n, d]`.
      residual: `[(s kept), n, d]`.
      bias: what the residuals' last layer has added to them, `[d]`, without gradient there; it gets
        it here, as the sum of a gradient that is at hand.
      gamma: float32 `[1, d]`.
      order: int `[s, q]`.

    Returns:
      `[(s q), n, d]` in the type of `x`.
    """
    kept = residual.shape[0] // order.shape[0]

    def kernel(order, x, residual, gamma):
        plan = _Plan(order, x, kept, grid_of="all")
        return plan.call(
            functools.partial(_join_kernel, kept=kept),
            name="drop_path_join",
            operands=[(x, plan.stream), (residual, plan.branch), (gamma, plan.vector)],
            results=[(x, plan.stream)],
        )

    return on_each_device(kernel, order, x, residual, replicated=(gamma,))


def _join_backward(saved, grad):
    residual, bias, gamma, order = saved
    kept = residual.shape[0] // order.shape[0]

    def kernel(order, grad, residual, gamma):
        plan = _Plan(order, grad, kept, grid_of="kept")
        sums = (plan.sums_shape, plan.sums)
        return plan.call(
            functools.partial(_join_backward_kernel, num_rows=grad.shape[1]),
            name="drop_path_join_backward",
            operands=[(grad, plan.stream), (residual, plan.branch), (gamma, plan.vector)],
            results=[(residual, plan.branch), sums, sums],
        )

    dresidual, dgamma, dbias = on_each_device(kernel, order, grad, residual, replicated=(gamma,))
    dbias = dbias.sum(axis=(0, 1, 2)).astype(bias.dtype)
    return grad, dresidual, dbias, dgamma.sum(axis=(0, 1)), None


join.defvjp(lambda x, *rest: (join(x, *rest), rest), _join_backward)


class _Blocks(NamedTuple):
    """How a kernel takes an array: a block a step, of so many different images in all."""

    spec: pl.BlockSpec
    images: int


class _Plan:
    """Blocks of one image's tokens, in the order of the images, on a grid of (group, image, step).

    Attributes:
      stream: of the tokens of the grid's images, the kept ones first.
      branch: of the kept images' own arrays, staying at the last of them, so that it is read once.
      sums: a row of `[images, steps, 1, d]` for each step; `sums_shape`.
      vector: of `[1, d]`.
    """

    def __init__(self, order: jax.Array, x: jax.Array, kept: int, *, grid_of: str):
        (s, q), (_, n, d) = order.shape, x.shape
        rows, of = block_rows(n), {"kept": kept, "all": q}[grid_of]
        steps = pl.cdiv(n, rows)
        # Numbers in the whole array, in one row, as the chip's memory for scalars likes them.
        self._places = (order + q * jnp.arange(s, dtype=order.dtype)[:, None]).reshape(-1)
        self._grid = s, of, steps

        def stream(group, i, step, places):
            return places[group * q + i], step, 0

        def branch(group, i, step, places):
            step = jnp.where(i < kept, step, steps - 1)
            return group * kept + jnp.minimum(i, kept - 1), step, 0

        tokens = (1, rows, d)
        self.stream = _Blocks(pl.BlockSpec(tokens, stream), s * of)
        self.branch = _Blocks(pl.BlockSpec(tokens, branch), s * kept)
        self.vector = _Blocks(pl.BlockSpec((1, d), lambda *_: (0, 0)), 0)
        sums = pl.BlockSpec((1, 1, 1, d), lambda group, i, step, _: (group * of + i, step, 0, 0))
        self.sums = _Blocks(sums, s * of)
        self.sums_shape = jax.ShapeDtypeStruct((s * of, steps, 1, d), jnp.float32)

    def call(self, kernel: Callable, *, name: str, operands: list, results: list, in_place=None):
        """Runs a kernel on (array, blocks), for (array or shape, blocks); one result comes bare.

        The first result takes the place of the operand `in_place`, if given, and is that operand
        wherever the grid does not come. One that is needed afterwards XLA copies.
        """
        arrays, ins = zip(*operands, strict=True)
        likes, outs = zip(*results, strict=True)
        moved = list(zip((*arrays, *likes), (*ins, *outs), strict=True))
        found = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=self._grid,
                in_specs=[blocks.spec for blocks in ins],
                out_specs=[blocks.spec for blocks in outs],
            ),
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like in likes],
            name=name,
            # The images' numbers are operand 0.
            input_output_aliases={} if in_place is None else {1 + in_place: 0},
            **call_settings(
                grid=self._grid,
                blocks=[(blocks.spec.block_shape, a.dtype) for a, blocks in moved],
                num_bytes=sum(
                    a.size * a.dtype.itemsize * blocks.images // a.shape[0] for a, blocks in moved
                ),
            ),
        )(self._places, *arrays)
        return found[0] if len(found) == 1 else found


def _fork_kernel(_, x_ref, scale_ref, bias_ref, out_ref):
    normal, _ = statistics(x_ref[0])
    out_ref[0] = (normal * scale_ref[...] + bias_ref[...]).astype(out_ref.dtype)


def _fork_backward_kernel(
    _, x_ref, through_ref, grad_ref, scale_ref, out_ref, dscale_ref, dbias_ref, *, num_rows: int
):
    first_row = pl.program_id(2) * x_ref.shape[1]
    dx, dscale_ref[0, 0], dbias_ref[0, 0] = gradients(
        x_ref[0], grad_ref[0], scale_ref[...], first_row=first_row, num_rows=num_rows
    )
    out_ref[0] = (through_ref[0].astype(jnp.float32) + dx).astype(out_ref.dtype)


def _join_kernel(_, x_ref, residual_ref, gamma_ref, out_ref, *, kept: int):
    is_kept = pl.program_id(1) < kept

    @pl.when(is_kept)
    def _():
        residual = residual_ref[0].astype(jnp.float32) * gamma_ref[...]
        out_ref[0] = (x_ref[0].astype(jnp.float32) + residual).astype(out_ref.dtype)

    @pl.when(~is_kept)
    def _():
        out_ref[...] = x_ref[...]


def _join_backward_kernel(
    _, grad_ref, residual_ref, gamma_ref, out_ref, dgamma_ref, dbias_ref, *, num_rows: int
):
    first_row = pl.program_id(2) * grad_ref.shape[1]
    grad = zero_beyond(grad_ref[0], first_row=first_row, num_rows=num_rows)
    residual = zero_beyond(residual_ref[0], first_row=first_row, num_rows=num_rows)
    dresidual = grad * gamma_ref[...]
    out_ref[0] = dresidual.astype(out_ref.dtype)
    dgamma_ref[0, 0] = (grad * residual).sum(axis=0, keepdims=True)
    dbias_ref[0, 0] = dresidual.sum(axis=0, keepdims=True)
