"""Sliding windows: exactly mmseg's rule, in matrices and strips."""

import numpy as np
import pytest

from dinov2_jax.evals.dense import windows
from dinov2_jax.evals.dense.windows import (
    assemble_strip,
    cut_windows,
    strips,
    window_matrices,
    window_starts,
)
from tests.parity import require


@pytest.mark.parametrize(
    ("size", "crop", "stride", "expected"),
    [
        (512, 512, 341, [0]),
        (683, 512, 341, [0, 171]),
        (853, 512, 341, [0, 341]),
        (854, 512, 341, [0, 341, 342]),
        (1280, 640, 320, [0, 320, 640]),
        (300, 512, 341, [0]),
    ],
)
def test_starts(size, crop, stride, expected):
    assert window_starts(size, crop, stride) == expected


def test_windows_are_cut_row_by_row():
    image = np.arange(5 * 7).reshape(5, 7, 1)
    found = cut_windows(image, 4, 3)
    assert found.shape == (4, 4, 4, 1)
    assert found[:, 0, 0, 0].tolist() == [0, 3, 7, 10]


def test_every_pixel_is_a_mean():
    matrices = window_matrices(size=50, crop=20, stride=13, grid=4, new_size=33)
    assert matrices.shape == (4, 33, 4)
    np.testing.assert_allclose(matrices.sum(axis=(0, 2)), 1, rtol=1e-6)


def assembled(maps, size, crop, stride, new_size):
    rows, columns = (
        window_matrices(side, crop, stride, grid, new)
        for side, grid, new in zip(size, maps.shape[2:4], new_size, strict=True)
    )
    parts = [
        np.asarray(assemble_strip(maps, rows, columns, strip, count))[: strip.stop - strip.start]
        for strip, count in strips(*new_size, maps.shape[-1])
    ]
    return np.concatenate(parts)[:, : new_size[1]]


@pytest.mark.parity
@pytest.mark.parametrize("strip_numbers", [1 << 23, 2000])
def test_it_is_mmsegs_slide_inference(strip_numbers, monkeypatch):
    """Stretch each window's logits, sum, divide by the count, resize to the original."""
    torch = require("torch")
    monkeypatch.setattr(windows, "_STRIP_NUMBERS", strip_numbers)
    resize = torch.nn.functional.interpolate
    size, crop, stride, new_size = (45, 62), 40, 17, (31, 70)
    starts = [window_starts(side, crop, stride) for side in size]
    maps = np.random.default_rng(0).standard_normal((len(starts[0]), len(starts[1]), 3, 3, 5))
    maps = maps.astype(np.float32)
    total, count = torch.zeros(1, 5, *size), torch.zeros(1, 1, *size)
    for i, y in enumerate(starts[0]):
        for j, x in enumerate(starts[1]):
            logits = torch.tensor(maps[i, j]).permute(2, 0, 1)[None]
            where = (..., slice(y, y + crop), slice(x, x + crop))
            total[where] += resize(logits, size=(crop, crop), mode="bilinear", align_corners=False)
            count[where] += 1
    expected = resize(total / count, size=new_size, mode="bilinear", align_corners=False)
    ours = assembled(maps, size, crop, stride, new_size)
    np.testing.assert_allclose(ours, expected[0].permute(1, 2, 0), atol=1e-5)
    assert len(starts[0]) * len(starts[1]) == 6
