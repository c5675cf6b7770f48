"""Prototypes visited a block at a time, so that no array of [rows, k] ever exists.

What the passes over the prototypes share: logits of one block, the scan over blocks, and where
rows and prototypes lie on the mesh. Prototypes stay where they are stored; features, which are
far smaller, are gathered instead, and sums over a mesh axis are written out (`shard_map`).
"""

import dataclasses
import math
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from dinov2_jax.sharding import BATCH_AXES

# Numbers in the largest array of one block on one device, its logits or its weights: 8 MiB in
# float32. See docs/performance.md, "Prototype losses".
NUMBERS_PER_BLOCK = 2**21


@flax.struct.dataclass
class Prototypes:
    """Prototypes, or a block of them, as the head's last layer stores them, and their norms.

    These are known beforehand, so that no visit sums over the directions again. They are constants:
    `to_parameters` is the gradient through them too.
    """

    weight_v: Array  # directions [k, d]
    weight_g: Array  # lengths [k, 1]
    norms: Array  # of the directions, [k, 1]
    dtype: jnp.dtype = flax.struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

    @property
    def weight(self) -> Array:
        """The vectors themselves, `[k, d]` in the compute type."""
        return (self.weight_v * self.scale).astype(self.dtype)

    @property
    def scale(self) -> Array:
        """The factors `[k, 1]` that make the vectors of the directions."""
        return self.weight_g / self.norms

    def to_parameters(self, grad_weight: Array) -> tuple[Array, Array]:
        """From the gradient for the vectors `[k, d]` to those for directions and lengths."""
        per_length = (grad_weight * self.weight_v).sum(axis=-1, keepdims=True) / self.norms
        along = self.weight_v * (per_length / self.norms)  # what the norm takes out
        return (grad_weight - along) * self.scale, per_length

    def logits(self, features: Array) -> Array:
        """`[..., d]` to float32 `[..., k]`."""
        return jnp.einsum(
            "...d,kd->...k",
            features.astype(self.dtype),
            self.weight,
            preferred_element_type=jnp.float32,
        )

    def mean_logits(self, features: Array) -> Array:
        """The mean of the logits of rows that average to `features [d]`, float32 `[k]`."""
        weight = self.weight.astype(jnp.float32)
        return jnp.einsum("d,kd->k", features, weight, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a pass over the prototypes is cut: into blocks in time, over mesh axes in space.

    Attributes:
      num_blocks: that a device's own prototypes are visited in.
      row_axes: mesh axes that the rows' leading axis is cut over.
      prototype_axes: mesh axes that the prototypes are cut over.
      cuts_rows: whether several devices hold rows.
      has_kernels: whether Pallas kernels make the passes that there are some for, not `visit`.
    """

    num_blocks: int
    row_axes: tuple[str, ...] = ()
    prototype_axes: tuple[str, ...] = ()
    cuts_rows: bool = False
    has_kernels: bool = False

    def run(self, function: Callable, rows, prototypes, scalars=()):
        """`function(rows, prototypes, scalars)` on each device's part of them.

        Each argument is a pytree; the function returns three likewise: what is cut like the rows,
        what is cut like the prototypes, and what is the same everywhere.
        """
        if jax.sharding.get_abstract_mesh().empty:
            return function(rows, prototypes, scalars)
        specs = (P(self.row_axes), P(self.prototype_axes), P())
        run = jax.shard_map(function, in_specs=specs, out_specs=specs, check_vma=False)
        return run(rows, prototypes, scalars)

    def visit(self, step: Callable, carry, prototypes):
        """`carry, out = step(carry, block)` for one block of `prototypes` after the other.

        The blocks of `[k, ...]` are consecutive: a reshape that moves nothing. The outputs of all
        blocks are put together again to `[k, ...]`.
        """

        def split(x: Array) -> Array:
            return x.reshape(self.num_blocks, -1, *x.shape[1:])

        carry, out = jax.lax.scan(step, carry, jax.tree.map(split, prototypes))
        return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    def sum_rows(self, tree):
        """Sums over the devices that hold other rows."""
        return jax.lax.psum(tree, self.row_axes) if self.row_axes else tree

    def max_rows(self, x: Array) -> Array:
        """The maximum over the devices that hold other rows."""
        return jax.lax.pmax(x, self.row_axes) if self.row_axes else x

    def sum_prototypes(self, tree):
        """Sums over the devices that hold other prototypes."""
        return jax.lax.psum(tree, self.prototype_axes) if self.prototype_axes else tree

    def max_prototypes(self, x: Array) -> Array:
        """The maximum over the devices that hold other prototypes."""
        return jax.lax.pmax(x, self.prototype_axes) if self.prototype_axes else x

    def first_prototype(self, num_local: int) -> Array:
        """Index, among all, of the first of the `num_local` prototypes that this device holds."""
        index = jax.lax.axis_index(self.prototype_axes) if self.prototype_axes else 0
        return index * num_local


def choose_layout(
    row_shape: tuple[int, ...],
    num_prototypes: int,
    *,
    width: int,
    block_size: int = 0,
    has_kernels: bool = False,
) -> Layout:
    """The layout of a pass, from shapes and the mesh in use.

    `fsdp` cuts rows or prototypes: whichever of the two then has to be gathered is the smaller.
    Axes that do not divide are left out.

    Args:
      row_shape: `[s, ...]` of the rows; groups `s` are what the batch is cut over.
      num_prototypes: k.
      width: of the features and prototypes, d.
      block_size: prototypes of a block on one device; 0: such that a block's logits, or its
        weights if they are more, are about `NUMBERS_PER_BLOCK`. The divisor of the device's
        prototypes that is nearest to it is taken: all of them, if their number is prime.
      has_kernels: see `Layout`.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)

    def fit(size: int, axes: tuple[str, ...]) -> tuple[str, ...]:
        while size % math.prod(sizes.get(axis, 1) for axis in axes):
            axes = axes[:-1]
        return tuple(axis for axis in axes if axis in sizes)

    def local(size: int, axes: tuple[str, ...]) -> int:
        return size // math.prod(sizes[axis] for axis in axes)

    row_axes, prototype_axes = fit(row_shape[0], BATCH_AXES), fit(num_prototypes, ("model",))
    rows = math.prod(row_shape)
    if sizes.get("fsdp", 1) > 1:
        fewer, more = fit(row_shape[0], ("data",)), fit(num_prototypes, ("model", "fsdp"))
        if "fsdp" in more and local(rows, fewer) <= local(num_prototypes, prototype_axes):
            row_axes, prototype_axes = fewer, more
    num_local = local(num_prototypes, prototype_axes)
    wished = block_size or NUMBERS_PER_BLOCK / max(local(rows, row_axes), width)
    num_blocks = num_local // nearest_divisor(num_local, wished)
    cuts_rows = math.prod(sizes[axis] for axis in row_axes) > 1
    return Layout(num_blocks, row_axes, prototype_axes, cuts_rows, has_kernels)


def nearest_divisor(number: int, wished: float) -> int:
    """The divisor of `number` whose ratio to `wished` is nearest to 1."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: abs(math.log(divisor / wished)))
