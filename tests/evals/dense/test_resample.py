"""Resizing against PyTorch's, which has OpenCV's positions."""

import numpy as np
import pytest

from dinov2_jax.evals.dense.resample import resize_bilinear, resize_nearest, scaled_size
from tests.parity import require

SIZES = [((20, 30), (7, 45)), ((13, 9), (13, 27)), ((8, 8), (3, 3)), ((1, 5), (4, 2))]


@pytest.mark.parity
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_they_are_pytorchs(old, new):
    torch = require("torch")
    image = np.random.default_rng(0).integers(0, 256, (*old, 3), np.uint8)
    x = torch.tensor(image).permute(2, 0, 1)[None].double()
    smooth = torch.nn.functional.interpolate(x, size=new, mode="bilinear", align_corners=False)
    ours = resize_bilinear(image, *new)
    np.testing.assert_allclose(ours, smooth[0].permute(1, 2, 0), atol=0.501)  # of rounding
    nearest = torch.nn.functional.interpolate(x, size=new, mode="nearest")[0, 0]
    np.testing.assert_array_equal(resize_nearest(image[..., 0], *new), nearest)


def test_the_size_that_is_there_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    assert resize_bilinear(image, 6, 7) is image
    np.testing.assert_array_equal(resize_nearest(image[..., 0], 6, 7), image[..., 0])


@pytest.mark.parametrize(
    ("size", "short_side_px", "expected"),
    [
        ((480, 640), 512, (512, 683)),  # 682.67
        ((640, 480), 512, (683, 512)),
        ((360, 481), 512, (512, 684)),  # 684.09
        ((500, 333), 512, (769, 512)),  # 768.77
    ],
)
def test_scaled_size(size, short_side_px, expected):
    assert scaled_size(*size, short_side_px) == expected
