"""Features without a network, by hand."""

import numpy as np

from dinov2_jax.evals.baselines import baseline_features, color_stats, raw_pixels


def test_raw_pixels_are_box_means_without_the_images_mean():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    boxes = image.reshape(32, 2, 32, 3, 3).mean(axis=(1, 3))
    expected = np.moveaxis(boxes, -1, 0).ravel()
    np.testing.assert_allclose(raw_pixels(image), expected - expected.mean(), atol=1)  # rounded
    brighter = raw_pixels(image // 2 + 100)
    cosine = (
        brighter @ raw_pixels(image) / np.sqrt((brighter**2).sum() * (raw_pixels(image) ** 2).sum())
    )
    assert cosine > 0.999


def test_color_stats_are_mean_and_deviation_of_each_channel():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = (10, 20, 30)
    np.testing.assert_allclose(color_stats(image), [5, 10, 15, 5, 10, 15])


def test_rows_are_the_images_in_order():
    images = [np.full((8, 8, 1), level, np.uint8) for level in (10, 30)]
    features = baseline_features((image, 0) for image in images)
    np.testing.assert_array_equal(features["color_stats"], [[10, 0], [30, 0]])
    np.testing.assert_array_equal(features["raw_pixels"], np.zeros((2, 1024)))
