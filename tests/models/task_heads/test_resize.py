"""Bilinear resizing against PyTorch's, up and down."""

import numpy as np
import pytest

from dinov2_jax.models.task_heads.resize import bilinear_matrix, resize_bilinear
from tests.parity import require


@pytest.mark.parity
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(6, 10), (12, 20), (5, 4), (2, 1)])
def test_pytorch(size, align_corners):
    torch = require("torch")
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=align_corners
    )
    ours = resize_bilinear(x, size, align_corners=align_corners)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
def test_rows_sum_to_one_and_the_same_size_is_the_same(align_corners):
    for size, new_size in ((1, 4), (4, 1), (7, 3), (3, 7)):
        matrix = bilinear_matrix(size, new_size, align_corners=align_corners)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(bilinear_matrix(5, 5, align_corners=align_corners), np.eye(5))
