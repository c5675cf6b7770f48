"""How prototypes are cut into blocks and over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.losses import blocks
from dinov2_jax.sharding import make_mesh


@pytest.mark.parametrize(
    ("number", "wished", "expected"),
    [(48, 4, 4), (48, 5, 6), (48, 7, 8), (65_537, 4096, 65_537), (7, 0.01, 1), (12, 1e9, 12)],
)
def test_nearest_divisor(number, wished, expected):
    assert blocks.nearest_divisor(number, wished) == expected


@pytest.mark.parametrize("num_rows", [1, 80, 600, 240_000])
@pytest.mark.parametrize("k", [4096, 65_536, 131_072])
def test_a_block_has_the_wished_size(num_rows, k):
    layout = blocks.choose_layout((1, num_rows), k, width=256)
    largest = max(num_rows, 256) * k // layout.num_blocks
    assert largest <= 1.5 * blocks.NUMBERS_PER_BLOCK
    assert largest >= blocks.NUMBERS_PER_BLOCK / 1.5 or layout.num_blocks == 1


def test_a_block_size_is_taken_at_its_word_if_it_divides():
    layout = blocks.choose_layout((8, 100), 4096, width=8, block_size=512)
    assert layout == blocks.Layout(8)


@pytest.mark.parametrize(
    ("mesh", "row_shape", "k", "row_axes", "prototype_axes"),
    [
        # Few rows: fsdp cuts the prototypes, features are gathered over it.
        (dict(data=2, fsdp=2, model=2), (8, 2), 64, ("data",), ("model", "fsdp")),
        # Many rows: fsdp cuts the rows.
        (dict(data=2, fsdp=2, model=2), (8, 90), 64, ("data", "fsdp"), ("model",)),
        # What does not divide is not cut.
        (dict(data=2, fsdp=2, model=2), (8, 2), 66, ("data", "fsdp"), ("model",)),
        (dict(data=2, fsdp=2, model=2), (2, 90), 65, ("data",), ()),
        (dict(data=8), (8, 2), 640, ("data", "fsdp"), ("model",)),
    ],
)
def test_layout_on_a_mesh(mesh, row_shape, k, row_axes, prototype_axes):
    with jax.set_mesh(make_mesh(**mesh)):
        layout = blocks.choose_layout(row_shape, k, width=8, block_size=4)
    assert (layout.row_axes, layout.prototype_axes) == (row_axes, prototype_axes)
    num_local = k // np.prod([mesh.get(axis, 1) for axis in prototype_axes], dtype=int)
    assert layout.num_blocks == num_local // blocks.nearest_divisor(num_local, 4)


def test_visit_goes_through_the_prototypes_in_order():
    seen, doubled = blocks.Layout(4).visit(
        lambda carry, block: (carry * 10 + block.sum(), 2 * block), 0, jnp.arange(8)
    )
    assert seen == ((0 + 1) * 1000 + (2 + 3) * 100 + (4 + 5) * 10 + 13)
    np.testing.assert_array_equal(doubled, 2 * np.arange(8))
