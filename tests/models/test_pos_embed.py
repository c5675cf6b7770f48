"""Resizing the position table: against goldens, PyTorch's kernels and the reference module."""

import numpy as np
import pytest

from dinov2_jax.models.pos_embed import interpolate_pos_embed, resize_matrix
from tests.parity import require
from tests.reference.golden_values import arrays

SIZES = [(16, 7), (37, 7), (37, 16), (37, 28), (37, 39), (37, 46), (16, 37), (14, 6), (37, 1)]


@pytest.mark.parametrize("interpolation", ["offset", "plain", "antialias"])
@pytest.mark.parametrize(("size", "new_size"), SIZES)
def test_rows_sum_to_one(size, new_size, interpolation):
    matrix = resize_matrix(size, new_size, interpolation)
    assert matrix.shape == (new_size, size)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)


def test_only_the_offset_changes_an_axis_that_keeps_its_length():
    np.testing.assert_array_equal(resize_matrix(9, 9, "antialias"), np.eye(9))
    np.testing.assert_array_equal(resize_matrix(9, 9, "plain"), np.eye(9))
    # The scale is taken from 9.1, hence not the identity: the reference never resizes to the same
    # grid, except when a non-square image has as many patches as the table.
    assert np.abs(resize_matrix(9, 9, "offset") - np.eye(9)).max() > 0.01


def test_same_grid_returns_the_table_itself():
    table = np.zeros((1, 1 + 12, 2))
    for interpolation in ("offset", "antialias"):
        resized = interpolate_pos_embed(
            table, stored_grid=(3, 4), grid=(3, 4), interpolation=interpolation
        )
        assert resized is table


def test_as_many_patches_on_another_grid_are_resized():
    table = np.random.default_rng(0).standard_normal((1, 1 + 16, 2)).astype(np.float32)
    resized = interpolate_pos_embed(table, stored_grid=(4, 4), grid=(2, 8))
    assert resized.shape == table.shape
    assert np.abs(resized - table)[0, 1:].max() > 0.1


@pytest.mark.parametrize(
    ("file_name", "patch", "grid", "interpolation"),
    [
        ("vit_mlp", 14, (37, 37), "offset"),
        ("vit_reg4", 14, (37, 37), "antialias"),
        ("vit_patch16", 16, (14, 14), "offset"),
    ],
)
def test_golden_tables(file_name, patch, grid, interpolation):
    golden = arrays(f"{file_name}.npz")
    sizes = [name.split("/")[0] for name in golden if name.endswith("pos_embed_every11")]
    assert len(sizes) >= 3
    for size in sizes:
        height, width = map(int, size.split("x"))
        table = interpolate_pos_embed(
            golden["param/pos_embed"],
            stored_grid=grid,
            grid=(height // patch, width // patch),
            interpolation=interpolation,
        )
        # The reference computes positions in float32, which moves entries of size 1 by 1e-5.
        np.testing.assert_allclose(
            table[:, ::11], golden[f"{size}/pos_embed_every11"], atol=1e-5, err_msg=size
        )


@pytest.mark.parity
@pytest.mark.parametrize("interpolation", ["offset", "plain", "antialias"])
@pytest.mark.parametrize(
    ("stored_grid", "grid"),
    [
        *(((size, size), (new_size, new_size)) for size, new_size in SIZES),
        ((37, 37), (28, 37)),
        ((37, 37), (45, 60)),
        ((16, 16), (8, 32)),
    ],
)
def test_pytorch_kernels(stored_grid, grid, interpolation):
    torch = require("torch")
    rng = np.random.default_rng(0)
    table = rng.standard_normal((1, 1 + stored_grid[0] * stored_grid[1], 4)).astype(np.float32)
    image = torch.tensor(table[:, 1:].reshape(1, *stored_grid, 4)).permute(0, 3, 1, 2)
    if interpolation == "offset":
        scale = tuple((new + 0.1) / old for new, old in zip(grid, stored_grid, strict=True))
        arguments = dict(scale_factor=scale, mode="bicubic")
    elif interpolation == "plain":
        arguments = dict(size=grid, mode="bicubic")
    else:
        arguments = dict(size=grid, mode="bicubic", antialias=True)
    ours = interpolate_pos_embed(
        table, stored_grid=stored_grid, grid=grid, interpolation=interpolation
    )
    # In float64 PyTorch's positions are exact, as ours are: only our float32 products round.
    for dtype, atol in ((torch.float64, 1e-6), (torch.float32, 3e-5)):
        theirs = torch.nn.functional.interpolate(image.to(dtype), **arguments)
        theirs = theirs.permute(0, 2, 3, 1).reshape(1, -1, 4).numpy()
        np.testing.assert_allclose(ours[:, 1:], theirs, atol=atol)
    np.testing.assert_array_equal(ours[:, :1], table[:, :1])


@pytest.mark.parity
def test_reference_module():
    torch = require("torch")
    transformer = require("dinov2.models.vision_transformer")
    model = transformer.DinoVisionTransformer(img_size=56, patch_size=14, embed_dim=8, num_heads=1)
    for height, width in ((56, 56), (28, 112), (98, 70)):
        tokens = torch.zeros(1, 1 + height // 14 * (width // 14), 8)
        theirs = model.interpolate_pos_encoding(tokens, height, width).detach().numpy()
        ours = interpolate_pos_embed(
            model.pos_embed.detach().numpy(),
            stored_grid=(4, 4),
            grid=(height // 14, width // 14),
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=f"{height}x{width}")


def test_errors():
    table = np.zeros((1, 1 + 16, 2))
    with pytest.raises(ValueError, match=r"stored_grid=\(3, 4\) must multiply .*, 16; set pos"):
        interpolate_pos_embed(table, stored_grid=(3, 4), grid=(2, 2))
    with pytest.raises(ValueError, match=r"interpolation='bilinear' must be one of \('offset'"):
        interpolate_pos_embed(table, stored_grid=(4, 4), grid=(2, 2), interpolation="bilinear")
