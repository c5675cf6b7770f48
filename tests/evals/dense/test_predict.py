"""Predictions: several sizes and mirror images against mmseg's rule, depth against its own."""

import numpy as np
import pytest

from dinov2_jax.evals.dense.predict import (
    BatchedMaps,
    Slide,
    normalise,
    predict_classes,
    predict_depth,
)
from dinov2_jax.evals.dense.resample import resize_bilinear, scaled_size
from dinov2_jax.evals.dense.windows import window_starts
from tests.evals.dense.models import pixels, random_image
from tests.parity import require

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
NORMAL = dict(mean=MEAN, std=STD)


def block_maps(windows: np.ndarray) -> np.ndarray:
    """Stands in for a network: three channels from means of 4 x 4 blocks, not symmetric."""
    b, height, width, _ = windows.shape
    blocks = windows[:, : height // 4 * 4, : width // 4 * 4]
    means = blocks.reshape(b, height // 4, 4, width // 4, 4, 3).mean(axis=(2, 4))
    return (3 * means * np.linspace(0.2, 1, means.shape[2])[:, None]).astype(np.float32)


@pytest.mark.parity
@pytest.mark.parametrize("flip", [False, True])
def test_sizes_and_mirror_images_are_averaged_as_probabilities(flip):
    torch = require("torch")
    resize = torch.nn.functional.interpolate
    image = random_image(37, 50)
    slide = Slide(short_side_px=24, crop_px=16, stride_px=11, ratios=(1.0, 1.5), flip=flip)
    total = torch.zeros(3, 37, 50)
    for ratio in slide.ratios:
        size = scaled_size(37, 50, int(24 * ratio))
        resized = normalise(resize_bilinear(image, *size), **NORMAL)
        for is_mirrored in (False, True)[: 1 + flip]:
            seen = resized[:, ::-1] if is_mirrored else resized
            logits, count = torch.zeros(1, 3, *size), torch.zeros(1, 1, *size)
            for y in window_starts(size[0], 16, 11):
                for x in window_starts(size[1], 16, 11):
                    maps = torch.tensor(block_maps(seen[None, y : y + 16, x : x + 16]))
                    maps = maps.permute(0, 3, 1, 2)
                    where = (..., slice(y, y + 16), slice(x, x + 16))
                    logits[where] += resize(maps, size=(16, 16), mode="bilinear")
                    count[where] += 1
            logits = resize(logits / count, size=(37, 50), mode="bilinear")[0]
            probabilities = torch.softmax(logits, dim=0)
            total += probabilities.flip(-1) if is_mirrored else probabilities
    expected = total.argmax(dim=0).numpy()
    ours = predict_classes(image, block_maps, slide, **NORMAL)
    # Equal up to pixels where two classes are equally likely in float32.
    gap = total.sort(dim=0).values
    is_clear = (gap[-1] - gap[-2]).numpy() > 1e-5
    assert is_clear.mean() > 0.99
    np.testing.assert_array_equal(ours[is_clear], expected[is_clear])
    assert len(np.unique(expected)) == 3


def test_votes_are_averaged_as_they_are():
    """Shares 0.9 of one look and 0.45 of another are no logits: their softmaxes would tie."""
    image = random_image(16, 16)
    slide = Slide(short_side_px=16, crop_px=16, stride_px=16)
    shares = np.array([0.2, 0.35, 0.45], np.float32)
    found = predict_classes(
        image,
        lambda x: np.broadcast_to(shares, (len(x), 2, 2, 3)),
        slide,
        **NORMAL,
        is_logits=False,
    )
    assert (found == 2).all()


def test_batches_of_any_size_are_the_images_one_by_one():
    model = pixels()
    maps = BatchedMaps(model, lambda v, _, x: v * x.mean(axis=(1, 2)), np.float32(2), 4)
    images = np.random.default_rng(0).standard_normal((7, 14, 14, 3)).astype(np.float32)
    np.testing.assert_allclose(maps(images), 2 * images.mean(axis=(1, 2)), rtol=1e-4, atol=1e-6)


def test_predictions_that_are_not_finite_are_an_error():
    maps = BatchedMaps(pixels(), lambda v, _, x: v * x, np.float32(np.nan), 2)
    with pytest.raises(ValueError, match="must be finite, and are not; the weights"):
        maps(np.ones((1, 14, 14, 3), np.float32))


def test_images_smaller_than_a_window_are_one_window():
    image = random_image(10, 14)
    slide = Slide(short_side_px=10, crop_px=40, stride_px=20)
    sizes = []

    def maps(windows):
        sizes.append(windows.shape)
        return block_maps(windows)

    assert predict_classes(image, maps, slide, **NORMAL).shape == (10, 14)
    assert sizes == [(1, 10, 14, 3)]


def test_depth_is_the_mean_of_the_image_and_its_mirror_image():
    image = random_image(12, 20)

    def maps(windows):
        means = windows.reshape(len(windows), 3, 4, 5, 4, 3).mean(axis=(2, 4, 5))
        return means + np.arange(5, dtype=np.float32)  # the same ramp for both

    once = predict_depth(image, maps, **NORMAL, size=(12, 20), flip=False)
    both = predict_depth(image, maps, **NORMAL, size=(12, 20))
    mirrored = predict_depth(image[:, ::-1], maps, **NORMAL, size=(12, 20), flip=False)
    np.testing.assert_allclose(both, (once + mirrored[:, ::-1]) / 2, atol=1e-5)
    assert np.abs(both - once).max() > 0.5
    np.testing.assert_allclose(both.mean(axis=0).max() - both.mean(axis=0).min(), 0, atol=2.5)


def test_depth_has_the_size_of_the_truth():
    image = random_image(12, 20)
    maps = lambda windows: np.full((len(windows), 3, 5), 2.5, np.float32)  # noqa: E731
    depth = predict_depth(image, maps, **NORMAL, size=(7, 31))
    assert depth.shape == (7, 31)
    np.testing.assert_allclose(depth, 2.5, rtol=1e-6)
