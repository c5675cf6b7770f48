"""What the Pallas kernels over prototypes share: tiles, padding, products and their stated cost.

Tiles of logits lie as [what is summed over, what stays]: sums go over sublanes and need no
transpose. Products are in the compute type, everything else is float32.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import ArrayLike

from dinov2_jax.models.tpu_tiles import LANES, MIB, round_up
from dinov2_jax.sharding import platform

TILE = 512  # rows or prototypes of a tile, at most
WIDE = 1024  # rows of one, where all prototypes are read again for each
NOWHERE = 1e30  # what padding subtracts from its logits: their exponential is 0


def tiles(size: int, *, multiple: int = 1, largest: int = TILE) -> tuple[int, int]:
    """A padded size and the tile that divides it, if into several tiles, a multiple of them."""
    count = -(-size // largest)
    if count > 1:
        count = -(-count // multiple) * multiple
    tile = round_up(-(-size // count), LANES)
    return count * tile, tile


def fill(x: Array, size: int, value: float = 0.0) -> Array:
    """Pads the first axis to `size`."""
    extra = size - x.shape[0]
    return jnp.pad(x, ((0, extra), *((0, 0),) * (x.ndim - 1)), constant_values=value)


def pack(size: int, *vectors: Array | tuple[Array, float]) -> Array:
    """Vectors as the rows of `[8, size]`, padded with 0, or with what stands beside them.

    In memory the columns of `[size, 1]` would be 128 wide.
    """
    pairs = [x if isinstance(x, tuple) else (x, 0.0) for x in vectors]
    rows = [fill(x.reshape(-1).astype(jnp.float32), size, value) for x, value in pairs]
    return jnp.stack(rows + [jnp.zeros(size)] * (8 - len(rows)))


def columns(ref, count: int) -> list[Array]:
    """The first rows of a block `[8, tile]`, as columns."""
    block = ref[...].T
    return [block[:, i : i + 1] for i in range(count)]


def scalars(*values: ArrayLike) -> Array:
    """Float32 `[1, len(values)]`, for a kernel's scalar memory."""
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in values])[None]


def accumulate(ref, new: Array, is_first, join=jnp.add) -> None:
    """Writes `new` in the first of the steps that visit a block, and joins it to it afterwards."""

    @pl.when(is_first)
    def _():
        ref[...] = new

    @pl.when(jnp.logical_not(is_first))
    def _():
        ref[...] = join(ref[...], new)


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product over one axis of each, summed in float32."""
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def cost(n: int, k: int, d: int, *, products: int, exps: int, num_bytes: int) -> pl.CostEstimate:
    """Of one call: products in whole tiles of the matrix unit, which is what they take."""
    return pl.CostEstimate(
        flops=2 * products * n * k * round_up(d, LANES),
        transcendentals=exps * n * k,
        bytes_accessed=num_bytes,
    )


def vmem_bytes(d: int) -> int:
    """What a step of a kernel needs: its blocks of width d, twice, and arrays of logits."""
    return 12 * TILE * 8 * round_up(d, LANES) + 10 * MIB


def interpret() -> bool:
    """Elsewhere the kernels' operations run one by one, for tests."""
    return platform() != "tpu"
