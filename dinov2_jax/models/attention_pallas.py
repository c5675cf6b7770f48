"""Self-attention for TPU as two Pallas kernels: forward, and one for all gradients at once.

In: the fused projection `[b, n, 3 d]`. Out: `[b, n, d]`. Sequences are short (50 and 257 tokens in
training), hence a whole row of logits at a time: no running softmax, no n x n matrix in memory.
Logits lie as [keys, queries], the queries of all heads of a lane group side by side: that is full
tiles, softmax sums without crossing lanes, and no transpose of anything of n x n.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dinov2_jax.models.attention_plan import ROWS, Plan, padded_heads
from dinov2_jax.models.tpu_tiles import LANES
from dinov2_jax.sharding import on_each_device


def fits(n: int, d: int, num_heads: int, itemsize: int = 2) -> bool:
    """Whether both kernels fit the vector memory of the TPU in use, or of the mesh's.

    On every chip in training; at 518 px (1370 tokens) on all but v4, which has 16 MiB.
    """
    if not pltpu.is_tpu_device():
        return True
    heads, hd = padded_heads(num_heads, d // num_heads)
    plan = Plan(ROWS, n, 3 * heads * hd, hd)  # of no more images than that are a step's
    return plan.vmem_bytes(itemsize) <= pltpu.get_tpu_info().vmem_capacity_bytes


def grid_steps(b: int, n: int, d: int, hd: int) -> int:
    """Grid steps of each kernel, for tokens `[b, n, d]` and heads of width `hd`, padded."""
    return math.prod(Plan(b, n, 3 * d, hd).grid)


def self_attention(
    qkv: jax.Array, bias: jax.Array | None = None, *, num_heads: int, interpret: bool = False
) -> jax.Array:
    """Scaled dot-product attention of every token to every token of its image.

    Each device of the mesh in use takes its own images; if the batch axes do not divide them, each
    takes all, as everywhere else in the network.

    Args:
      qkv: queries, keys and values, in this order, each head-major: `[b, n, 3 d]`.
      bias: what the projection has added, `[3 d]`, without gradient there; it gets it here, from
        the backward kernel, which has the numbers to be summed at hand. None if there is none.
      num_heads: divides d. Heads are padded to a width that divides, or is a multiple of, 128, and
        to whole groups of 128: heads of 64 in even number are not padded.
      interpret: run the kernels' operations one by one on any platform, for tests.

    Returns:
      `[b, n, d]` in the type of `qkv`; softmax in float32.
    """
    hd = qkv.shape[-1] // 3 // num_heads
    heads, padded_hd = padded_heads(num_heads, hd)
    attend = functools.partial(_attend, scale=hd**-0.5, hd=padded_hd, interpret=interpret)
    bias = jnp.zeros(qkv.shape[-1]) if bias is None else bias
    if (heads, padded_hd) == (num_heads, hd):
        return attend(qkv, bias)

    def pad(x):
        x = rearrange(x, "... (three heads hd) -> ... three heads hd", three=3, heads=num_heads)
        extra = ((0, heads - num_heads), (0, padded_hd - hd))
        x = jnp.pad(x, ((0, 0),) * (x.ndim - 2) + extra)
        return rearrange(x, "... three heads hd -> ... (three heads hd)")

    x = attend(pad(qkv), pad(bias))
    x = rearrange(x, "b n (heads hd) -> b n heads hd", heads=heads)
    return rearrange(x[:, :, :num_heads, :hd], "b n heads hd -> b n (heads hd)")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attend(qkv, bias, scale, hd, interpret):
    kernel = functools.partial(_forward, scale=scale, hd=hd, interpret=interpret)
    return on_each_device(kernel, qkv)


# The result is not kept: the backward pass makes the probabilities again, and with them all of it.
def _attend_backward(scale, hd, interpret, kept, grad):
    qkv, bias = kept
    kernel = functools.partial(_backward, scale=scale, hd=hd, interpret=interpret)
    dqkv, sums = on_each_device(kernel, qkv, grad)
    return dqkv, sums.sum(axis=(0, 1)).astype(bias.dtype)


_attend.defvjp(lambda *args: (_attend(*args), args[:2]), _attend_backward)


def _forward(qkv: jax.Array, *, scale: float, hd: int, interpret: bool) -> jax.Array:
    plan = Plan(*qkv.shape, hd)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan=plan, scale=scale),
        grid=plan.grid,
        in_specs=plan.qkv_specs,
        out_specs=plan.query_spec,
        out_shape=jax.ShapeDtypeStruct((plan.b, plan.n, plan.d), qkv.dtype),
        compiler_params=plan.compiler_params("parallel", qkv.dtype.itemsize),
        cost_estimate=plan.cost(products=2, num_bytes=4 * qkv.nbytes // 3),
        interpret=interpret,
        name="attention_forward",
    )(qkv, qkv, qkv)


def _backward(qkv, grad, *, scale: float, hd: int, interpret: bool) -> tuple:
    """The projection's gradient, and its sums `[.., 1, 3 d]` over the images of a grid step."""
    plan = Plan(*qkv.shape, hd)
    whole = pl.BlockSpec(
        (plan.images, plan.keys, 3 * plan.d), lambda image, group, step: (image, 0, 0)
    )
    sums = pltpu.VMEM((plan.images, plan.keys, plan.width), jnp.float32)
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan=plan, scale=scale),
        grid=plan.grid,
        in_specs=[*plan.qkv_specs, plan.query_spec],
        out_specs=[
            whole,
            pl.BlockSpec((1, 1, 3 * plan.d), lambda image, group, step: (image, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            jax.ShapeDtypeStruct((plan.grid[0], 1, 3 * plan.d), jnp.float32),
        ],
        scratch_shapes=[sums, sums],
        compiler_params=plan.compiler_params("arbitrary", qkv.dtype.itemsize),
        cost_estimate=plan.cost(products=5, num_bytes=7 * qkv.nbytes // 3),
        interpret=interpret,
        name="attention_backward",
    )(qkv, qkv, qkv, grad)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, plan: Plan, scale: float):
    for i in range(plan.images):
        q = _side_by_side(_load(q_ref, i, pl.program_id(2), plan), plan)
        k, v = _load(k_ref, i, 0, plan), _load(v_ref, i, 0, plan)
        weights, norm = _softmax(k, q, plan, scale)
        x = _dot(v.astype(jnp.float32).T.astype(v.dtype), weights.astype(v.dtype), 1, 0) * norm
        out_ref[i] = _each_its_own(x.T, plan).astype(out_ref.dtype)


def _backward_kernel(
    q_ref, k_ref, v_ref, grad_ref, out_ref, bias_ref, dk_sum, dv_sum, *, plan, scale
):
    group, step = pl.program_id(1), pl.program_id(2)
    totals = [jnp.zeros((1, plan.width), jnp.float32)] * 3

    def lanes(part):
        return pl.ds(pl.multiple_of((part * plan.groups + group) * plan.width, LANES), plan.width)

    def write(i, part, x, rows):
        out_ref[i, rows, lanes(part)] = x.astype(out_ref.dtype)
        # Of the last block of images some may not exist.
        exists = pl.program_id(0) * plan.images + i < plan.b
        totals[part] += jnp.where(exists, x.sum(axis=0, keepdims=True), 0.0)

    for i in range(plan.images):
        q = _side_by_side(_load(q_ref, i, step, plan), plan)
        grad = _side_by_side(_load(grad_ref, i, step, plan), plan)
        k, v = _load(k_ref, i, 0, plan), _load(v_ref, i, 0, plan)
        weights, norm = _softmax(k, q, plan, scale)
        probs = weights * norm  # [keys, queries]
        dprobs = _dot(v, grad, 1, 1)
        dv = _dot(probs.astype(grad.dtype), grad, 1, 0)
        mean = (probs * dprobs).sum(axis=0, keepdims=True)
        dlogits = (probs * (dprobs - mean)).astype(q.dtype)
        dk = _dot(dlogits, q, 1, 0) * scale
        dq = _dot(k.astype(jnp.float32).T.astype(k.dtype), dlogits, 1, 0).T * scale
        rows = pl.ds(pl.multiple_of(step * plan.rows, ROWS), plan.rows)
        write(i, 0, _each_its_own(dq, plan), rows)
        if plan.steps > 1:
            dk += jnp.where(step == 0, 0.0, dk_sum[i])
            dv += jnp.where(step == 0, 0.0, dv_sum[i])
            dk_sum[i], dv_sum[i] = dk, dv
        write(i, 1, dk, slice(None))
        write(i, 2, dv, slice(None))
    if plan.steps > 1:  # queries come in steps; of keys and values it is the last sum that stays
        totals[0] += jnp.where(step == 0, 0.0, bias_ref[0, :, lanes(0)])
    for part, total in enumerate(totals):
        bias_ref[0, :, lanes(part)] = total


def _load(ref, i: int, step, plan: Plan) -> jax.Array:
    """Rows of an image, zeros beyond its last token."""
    x = ref[i]
    rows = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + step * x.shape[0]
    return jnp.where(rows < plan.n, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _side_by_side(x: jax.Array, plan: Plan) -> jax.Array:
    """One copy of `[rows, width]` for each head, zero outside the lanes of that head.

    Filled up with zeros to whole registers: as the columns of a product, queries are lanes.
    """
    x32 = x.astype(jnp.float32)
    lanes = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    copies = [jnp.where(lanes // plan.hd == head, x32, 0.0) for head in range(plan.heads)]
    rows = plan.heads * plan.rows
    if rows % LANES:
        copies.append(jnp.zeros((-rows % LANES, plan.width), jnp.float32))
    return jnp.concatenate(copies).astype(x.dtype)


def _each_its_own(x: jax.Array, plan: Plan) -> jax.Array:
    """The inverse: of each head's rows `[(heads rows), width]` only its own lanes."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.width), 1)
    out = x[: plan.rows]
    for head in range(1, plan.heads):
        rows = x[head * plan.rows : (head + 1) * plan.rows]
        out = jnp.where(lanes // plan.hd == head, rows, out)
    return out


def _softmax(k: jax.Array, q: jax.Array, plan: Plan, scale: float):
    """Probabilities `[keys, queries]` but for their factors, `[1, queries]`, which come second."""
    logits = _dot(k, q, 1, 1)
    # Keys beyond n are in the last tile of rows, or few: the others need no comparison.
    whole = (plan.n - 1) // ROWS * ROWS
    tail = logits[whole:]
    rows = jax.lax.broadcasted_iota(jnp.int32, tail.shape, 0) + whole
    tail = jnp.where(rows < plan.n, tail, -jnp.inf)
    logits = jnp.concatenate([logits[:whole], tail]) if whole else tail
    # Powers of two are what the hardware has.
    weights = jnp.exp2((logits - logits.max(axis=0, keepdims=True)) * (scale * math.log2(math.e)))
    return weights, 1 / weights.sum(axis=0, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
