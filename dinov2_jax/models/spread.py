"""One sum over the mesh for each kernel's gradient, whatever sizes crops have.

Each product's gradient of a kernel is a sum over the mesh, and XLA does not put the sums of two
products together. So each device is given a copy of its own, whose gradients are added there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from dinov2_jax.sharding import BATCH_AXES, batch_shards, cut_axis, path_names, platform


def spread_kernels(params, *, dtype: jnp.dtype):
    """The same parameters, but for kernels `[d, f]`: a copy for each piece of the rows."""
    fsdp = jax.sharding.get_abstract_mesh().shape["fsdp"]

    def leaf(path, x):
        names = path_names(path)
        if names[-1] != "kernel":
            return x
        # SwiGLU's halves: put together before the sum, they would be cut across a TPU's lanes.
        num_parts = 2 if "w12" in names else 1
        cut = cut_axis(names, x.shape, fsdp)
        copies = spread(x.astype(dtype), cut, num_parts)
        # What nothing cuts is whole on each device: there is nothing to keep.
        return copies if cut is None else checkpoint_name(copies, "kernel")

    return jax.tree_util.tree_map_with_path(leaf, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def spread(x: jax.Array, cut: int | None, num_parts: int = 1) -> jax.Array:
    """A copy for each piece of the rows, `[(shards a), b]`, each where its piece is.

    Gradients of several uses of a copy are added there, and summed over the mesh once.

    Args:
      x: a kernel `[a, b]`.
      cut: axis by which `fsdp` cuts the sum, see `cut_axis`; None: nothing does.
      num_parts: equal parts of its last axis that are used, hence summed, by themselves.
    """
    return _copies(x)


def _copies(x: jax.Array) -> jax.Array:
    shards = batch_shards(jax.sharding.get_abstract_mesh())
    copies = jnp.broadcast_to(x, (shards, *x.shape))
    copies = jax.lax.with_sharding_constraint(copies, PartitionSpec(BATCH_AXES))
    return copies.reshape(-1, x.shape[1])


def _sum_pieces(cut: int | None, num_parts: int, _, grad: jax.Array) -> tuple[jax.Array]:
    """The sum of `[(shards a), b]`; said outright, as XLA sums everything before it cuts."""

    def add(part):
        if cut is None:
            return jax.lax.psum(part, BATCH_AXES)
        if platform() == "tpu":
            # Pieces along lanes would be narrower than a tile: all would be summed everywhere.
            part = with_layout_constraint(part, Layout((cut, 1 - cut)))
        own = jax.lax.psum_scatter(part, "fsdp", scatter_dimension=cut, tiled=True)
        return jax.lax.psum(own, "data")

    def add_parts(piece):
        parts = jnp.split(piece, num_parts, axis=-1)
        return jnp.concatenate([add(part) for part in parts], axis=-1)

    spec = PartitionSpec() if cut is None else PartitionSpec(*(None,) * cut, "fsdp")
    pieces = PartitionSpec(BATCH_AXES)
    return (jax.shard_map(add_parts, in_specs=pieces, out_specs=spec, check_vma=False)(grad),)


spread.defvjp(lambda x, *_: (_copies(x), None), _sum_pieces)


def product(x: jax.Array, copies: jax.Array) -> jax.Array:
    """Of rows `[b, .., d]` with a kernel of `spread`, `[(shards d), f]`; each shard by itself."""
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(jnp.matmul, in_specs=(rows, rows), out_specs=rows)(x, copies)
