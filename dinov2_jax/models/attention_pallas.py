"""Self-attention for TPU as two Pallas kernels: forward, and a backward that makes dq, dk and dv.

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
from jax.sharding import PartitionSpec

from dinov2_jax.sharding import BATCH_AXES

LANES = 128  # of a vector register; the width of what a kernel takes at a time
ROWS = 16  # of a tile of bfloat16
MAX_QUERIES = 640  # in one step, counted over the heads of a group; more take several steps
MIB = 2**20


def fits(n: int, d: int, num_heads: int, itemsize: int = 2) -> bool:
    """Whether both kernels fit the vector memory of the TPU in use, or of the mesh's.

    On every chip in training; at 518 px (1370 tokens) on all but v4, which has 16 MiB.
    """
    if not pltpu.is_tpu_device():
        return True
    hd = _padded_width(d // num_heads)
    plan = _Plan(1, n, 3 * d, hd)
    return plan.vmem_bytes(itemsize) <= pltpu.get_tpu_info().vmem_capacity_bytes


def grid_steps(b: int, n: int, d: int, hd: int) -> int:
    """Grid steps of each kernel, for tokens `[b, n, d]` and heads of width `hd`, padded."""
    return math.prod(_Plan(b, n, 3 * d, hd).grid)


def self_attention(qkv: jax.Array, *, num_heads: int, interpret: bool = False) -> jax.Array:
    """Scaled dot-product attention of every token to every token of its image.

    Each device of the mesh in use takes its own images; if the batch axes do not divide them, each
    takes all, as everywhere else in the network.

    Args:
      qkv: queries, keys and values, in this order, each head-major: `[b, n, 3 d]`.
      num_heads: divides d. Heads are padded to a width that divides, or is a multiple of, 128, and
        to whole groups of 128: heads of 64 in even number are not padded.
      interpret: run the kernels' operations one by one on any platform, for tests.

    Returns:
      `[b, n, d]` in the type of `qkv`; softmax in float32.
    """
    hd = qkv.shape[-1] // 3 // num_heads
    padded_hd = _padded_width(hd)
    padded_heads = _round_up(num_heads, max(1, LANES // padded_hd))
    attend = functools.partial(_attend, scale=hd**-0.5, hd=padded_hd, interpret=interpret)
    if (padded_heads, padded_hd) == (num_heads, hd):
        return attend(qkv)
    qkv = rearrange(qkv, "b n (three heads hd) -> b n three heads hd", three=3, heads=num_heads)
    extra = ((0, padded_heads - num_heads), (0, padded_hd - hd))
    qkv = jnp.pad(qkv, ((0, 0), (0, 0), (0, 0), *extra))
    x = attend(rearrange(qkv, "b n three heads hd -> b n (three heads hd)"))
    x = rearrange(x, "b n (heads hd) -> b n heads hd", heads=padded_heads)
    return rearrange(x[:, :, :num_heads, :hd], "b n heads hd -> b n (heads hd)")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _attend(qkv, scale, hd, interpret):
    kernel = functools.partial(_forward, scale=scale, hd=hd, interpret=interpret)
    return _on_each_device(kernel, qkv)


# The result is not kept: the backward pass makes the probabilities again, and with them all of it.
def _attend_backward(scale, hd, interpret, qkv, grad):
    kernel = functools.partial(_backward, scale=scale, hd=hd, interpret=interpret)
    return (_on_each_device(kernel, qkv, grad),)


_attend.defvjp(lambda qkv, *static: (_attend(qkv, *static), qkv), _attend_backward)


def _on_each_device(kernel, *arrays: jax.Array) -> jax.Array:
    """Runs a kernel, which XLA cannot partition, on the images of each device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(*arrays)
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    spec = PartitionSpec(axes if arrays[0].shape[0] % shards == 0 else None)
    # Kernels do not say over which axes their results vary, which the check asks for.
    return jax.shard_map(kernel, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def _forward(qkv: jax.Array, *, scale: float, hd: int, interpret: bool) -> jax.Array:
    plan = _Plan(*qkv.shape, hd)
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


def _backward(qkv, grad, *, scale: float, hd: int, interpret: bool) -> jax.Array:
    plan = _Plan(*qkv.shape, hd)
    whole = pl.BlockSpec(
        (plan.images, plan.keys, 3 * plan.d), lambda image, group, step: (image, 0, 0)
    )
    sums = pltpu.VMEM((plan.images, plan.keys, plan.width), jnp.float32)
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan=plan, scale=scale),
        grid=plan.grid,
        in_specs=[*plan.qkv_specs, plan.query_spec],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        scratch_shapes=[sums, sums],
        compiler_params=plan.compiler_params("arbitrary", qkv.dtype.itemsize),
        cost_estimate=plan.cost(products=5, num_bytes=7 * qkv.nbytes // 3),
        interpret=interpret,
        name="attention_backward",
    )(qkv, qkv, qkv, grad)


class _Plan:
    """How the arrays are cut: grid of (images, groups of heads, steps over the queries).

    A block may reach beyond the array: there it holds anything, NaN included.
    """

    def __init__(self, b: int, n: int, d3: int, hd: int):
        self.n, self.hd = n, hd
        self.b, self.d = b, d3 // 3
        self.width = max(LANES, hd)
        self.heads = self.width // hd  # of a group
        self.groups = self.d // self.width
        whole = _round_up(n, ROWS)
        if _round_up(self.heads * whole, LANES) <= MAX_QUERIES:
            self.rows, self.steps = whole, 1
        else:
            self.rows = max(2 * LANES // self.heads, ROWS)
            self.steps = pl.cdiv(n, self.rows)
        self.keys = self.rows * self.steps
        self.images = min(b, max(1, 256 // self.keys))
        self.grid = (pl.cdiv(b, self.images), self.groups, self.steps)
        self.query_spec = pl.BlockSpec(
            (self.images, self.rows, self.width), lambda image, group, step: (image, step, group)
        )

    def _all_rows(self, part: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (self.images, self.keys, self.width),
            lambda image, group, step: (image, 0, part * self.groups + group),
        )

    @property
    def qkv_specs(self) -> list[pl.BlockSpec]:
        """Of queries, keys and values, all inside the one fused array."""
        return [self.query_spec, self._all_rows(1), self._all_rows(2)]

    def cost(self, *, products: int, num_bytes: int) -> pl.CostEstimate:
        """Of one call: the products in whole tiles of the matrix unit, which is what they take."""
        unit = pltpu.get_tpu_info().mxu_column_size if pltpu.is_tpu_device() else LANES
        queries, runs = self.heads * self.rows, self.b * self.groups * self.steps
        tiles = 2 * self.keys * _round_up(queries, unit) * _round_up(self.width, unit)
        return pl.CostEstimate(
            flops=products * tiles * runs,
            transcendentals=self.keys * _round_up(queries, LANES) * runs,
            bytes_accessed=num_bytes,
        )

    def vmem_bytes(self, itemsize: int) -> int:
        """What the backward kernel needs: its result twice, and six arrays of logits."""
        result = self.images * self.keys * 3 * self.d * itemsize
        logits = self.keys * _round_up(self.heads * self.rows, LANES) * 4
        return 2 * result + 6 * logits

    def compiler_params(self, semantics: str, itemsize: int) -> pltpu.CompilerParams:
        """`semantics`: whether steps and groups may run in any order."""
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", semantics, semantics),
            vmem_limit_bytes=max(16 * MIB, self.vmem_bytes(itemsize)),
        )


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, plan: _Plan, scale: float):
    for i in range(plan.images):
        q = _side_by_side(_load(q_ref, i, pl.program_id(2), plan), plan)
        k, v = _load(k_ref, i, 0, plan), _load(v_ref, i, 0, plan)
        weights, norm = _softmax(k, q, plan, scale)
        x = _dot(v.astype(jnp.float32).T.astype(v.dtype), weights.astype(v.dtype), 1, 0) * norm
        out_ref[i] = _each_its_own(x.T, plan).astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, grad_ref, out_ref, dk_sum, dv_sum, *, plan, scale):
    group, step = pl.program_id(1), pl.program_id(2)

    def write(i, part, x, rows):
        lanes = pl.ds(pl.multiple_of((part * plan.groups + group) * plan.width, LANES), plan.width)
        out_ref[i, rows, lanes] = x.astype(out_ref.dtype)

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


def _load(ref, i: int, step, plan: _Plan) -> jax.Array:
    """Rows of an image, zeros beyond its last token."""
    x = ref[i]
    rows = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + step * x.shape[0]
    return jnp.where(rows < plan.n, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _side_by_side(x: jax.Array, plan: _Plan) -> jax.Array:
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


def _each_its_own(x: jax.Array, plan: _Plan) -> jax.Array:
    """The inverse: of each head's rows `[(heads rows), width]` only its own lanes."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.width), 1)
    out = x[: plan.rows]
    for head in range(1, plan.heads):
        rows = x[head * plan.rows : (head + 1) * plan.rows]
        out = jnp.where(lanes // plan.hd == head, rows, out)
    return out


def _softmax(k: jax.Array, q: jax.Array, plan: _Plan, scale: float):
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


def _padded_width(hd: int) -> int:
    return 1 << (hd - 1).bit_length() if hd < LANES else _round_up(hd, LANES)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
