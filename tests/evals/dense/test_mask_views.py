"""Views of segmentation: image and mask move together, crops are not of one class alone."""

import numpy as np
import pytest

from dinov2_jax.evals.dense.mask_sets import IGNORED
from dinov2_jax.evals.dense.mask_views import MaskAugment, distorted, fixed_view, padded
from tests.evals.dense.small_sets import COLORS, color_grid


def grid(seed=0):
    classes = color_grid(np.random.default_rng(seed)).astype(np.int16)
    return COLORS[classes], classes


def nearest_color(image):
    """The class whose colour is nearest."""
    return np.linalg.norm(image[..., None, :].astype(float) - COLORS, axis=-1).argmin(axis=-1)


def test_the_mask_goes_with_the_image():
    augment = MaskAugment(short_side_px=42, ratio=(0.7, 1.6), crop_px=38, is_distorted=False)
    shapes = set()
    for seed in range(8):
        image, classes = augment(*grid(seed), np.random.default_rng(seed))
        assert image.shape[:2] == classes.shape
        # Colours mix at the borders of cells alone.
        assert (nearest_color(image) == classes).mean() > 0.85
        shapes.add(classes.shape)
    assert (38, 38) in shapes
    assert min(shapes) < (38, 38)  # a scale below 38 / 42 leaves less than the crop


def test_the_same_numbers_make_the_same_view():
    augment = MaskAugment(short_side_px=42, ratio=(0.7, 1.6), crop_px=30)
    views = [augment(*grid(), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(views[0][0], views[1][0])
    assert views[0][0].shape != views[2][0].shape or (views[0][0] != views[2][0]).any()


@pytest.mark.parametrize(("max_share", "is_mixed"), [(0.75, True), (1.01, False)])
def test_crops_of_one_class_are_drawn_again(max_share, is_mixed):
    """Half of the image is one class and a hundredth of crops would mix, left to chance."""
    classes = np.zeros((40, 80), np.int16)
    classes[:, 40:] = 1
    image = COLORS[classes]
    augment = MaskAugment(
        short_side_px=40,
        ratio=(1.0, 1.0),
        crop_px=40,
        max_class_share=max_share,
        is_distorted=False,
    )
    views = [augment(image, classes, np.random.default_rng(i))[1] for i in range(60)]
    shares = [np.bincount(view.ravel(), minlength=2).max() / view.size for view in views]
    mixed = np.mean([share < 0.75 for share in shares])
    assert (mixed > 0.95) == is_mixed


def test_half_of_the_views_are_mirrored():
    augment = MaskAugment(short_side_px=42, ratio=(1.0, 1.0), crop_px=56, is_distorted=False)
    image, classes = grid()
    found = [augment(image, classes, np.random.default_rng(i))[1] for i in range(60)]
    same = np.mean([(x == classes).all() for x in found])
    mirrored = np.mean([(x == classes[:, ::-1]).all() for x in found])
    assert same + mirrored == 1
    assert 0.3 < same < 0.7


def test_distortion_changes_what_it_should():
    """Over many throws: a quarter keep their level, and grey stays grey."""
    grey = np.full((4, 4, 3), 128, np.uint8)
    found = np.stack([distorted(grey, np.random.default_rng(i)) for i in range(1000)])
    assert np.ptp(found.astype(int), axis=-1).max() <= 1
    means = found.mean(axis=(1, 2, 3))
    # Neither brightness nor contrast: a quarter.
    assert 0.2 < np.mean(means == 128) < 0.3
    low, high = 0.5 * (128 - 32), 1.5 * (128 + 32)
    assert low <= means.min() < 80 and 180 < means.max() <= high
    red = np.broadcast_to(np.array([200, 40, 40], np.uint8), (2, 2, 3))
    hues = {int(distorted(red, np.random.default_rng(i))[0, 0].argmax()) for i in range(200)}
    assert hues == {0}  # 36 degrees do not reach the next colour


def test_the_fixed_view_is_the_centre():
    image, classes = grid()
    found, labels = fixed_view(image, classes, short_side_px=42, crop_px=28)
    np.testing.assert_array_equal(labels, classes[7:35, 14:42])
    np.testing.assert_array_equal(found, image[7:35, 14:42])
    doubled = fixed_view(image, classes, short_side_px=84, crop_px=84)[1]
    assert doubled.shape == (84, 84)
    np.testing.assert_array_equal(doubled[::2, ::2], classes[:, 7:49])


def test_padding_asks_nothing():
    image, classes = padded(np.ones((2, 3, 3), np.float32), np.ones((2, 3), np.int16), side_px=4)
    assert image.shape == (4, 4, 3) and classes.shape == (4, 4)
    assert image.sum() == 18
    assert (classes == IGNORED).sum() == 10
