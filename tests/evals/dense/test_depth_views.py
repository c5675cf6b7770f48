"""Views of depth: image and depth move together, invented depth is none."""

import numpy as np
import pytest

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.dense.depth_views import NYU_CROP, DepthAugment, fixed_view, prepared
from tests.evals.dense.small_sets import COLORS, color_grid
from tests.evals.dense.test_mask_views import nearest_color


def scene(seed=0):
    classes = color_grid(np.random.default_rng(seed))
    return COLORS[classes], (classes + 1).astype(np.float32)


def test_depth_goes_with_the_image():
    augment = DepthAugment(crop_px=(28, 35), color_probability=0.0)
    for seed in range(8):
        image, depth = augment(*scene(seed), np.random.default_rng(seed))
        assert image.shape == (28, 35, 3) and depth.shape == (28, 35)
        assert set(np.unique(depth).tolist()) <= {0, 1, 2, 3}
        there = depth > 0
        assert (nearest_color(image) + 1 == depth)[there].mean() > 0.9


def test_turning_leaves_corners_without_depth_and_half_are_turned():
    augment = DepthAugment(
        crop_px=(42, 56), rotate_degrees=20.0, color_probability=0.0, flip_probability=0.0
    )
    image, depth = np.full((42, 56, 3), 100, np.uint8), np.ones((42, 56), np.float32)
    zeros = [(augment(image, depth, np.random.default_rng(i))[1] == 0).sum() for i in range(60)]
    assert 0.3 < np.mean(np.array(zeros) > 0) < 0.7
    assert max(zeros) < 0.3 * depth.size


def test_colors_change_within_their_range():
    augment = DepthAugment(
        crop_px=(4, 4), rotate_degrees=0.0, flip_probability=0.0, color_probability=1.0
    )
    image, depth = np.full((4, 4, 3), 100, np.uint8), np.ones((4, 4), np.float32)
    found = np.stack([augment(image, depth, np.random.default_rng(i))[0] for i in range(200)])
    assert found.min() >= int(100**0.9 * 0.75 * 0.9)
    assert found.max() <= int(100**1.1 * 1.25 * 1.1) + 1
    assert found.min() < 55 and found.max() > 170
    assert (found == found[:, :1, :1]).all()  # the same for every pixel of an image
    assert (np.ptp(found[:, 0, 0].astype(int), axis=-1) > 0).mean() > 0.9  # not for every channel


def test_the_fixed_view_is_the_centre():
    image, depth = scene()
    found, cut = fixed_view(image, depth, crop_px=(28, 42))
    np.testing.assert_array_equal(cut, depth[7:35, 7:49])
    np.testing.assert_array_equal(found, image[7:35, 7:49])


def test_a_part_has_the_scale_of_the_whole():
    image, depth = scene()
    half, half_depth = prepared(image, depth, short_side_px=21)
    np.testing.assert_array_equal(half_depth, depth[::2, ::2])
    assert (nearest_color(half) + 1 == half_depth).mean() > 0.95
    big = np.zeros((480, 640, 3), np.uint8), np.arange(480 * 640, dtype=np.float32)
    big = big[0], big[1].reshape(480, 640)
    image, depth = prepared(*big, short_side_px=240, box=NYU_CROP)
    assert image.shape == (214, 283, 3) and depth.shape == (214, 283)
    assert depth[0, 0] == big[1][45, 43]
    np.testing.assert_array_equal(prepared(*big, short_side_px=None)[1], big[1])


def test_crops_must_fit():
    with pytest.raises(DataError, match=r"crop 50 x 20 .* must fit into images of 42 x 56"):
        fixed_view(*scene(), crop_px=(50, 20))
