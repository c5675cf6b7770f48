"""J and F against scikit-image and the benchmark's steps written out; real masks where given."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image
from skimage import morphology

from dinov2_jax.evals.davis import open_davis, read_masks
from dinov2_jax.evals.mask_scores import (
    boundary,
    boundary_accuracy,
    dilated,
    region_similarity,
    statistics,
)


def blob(seed: int, shape=(60, 90)) -> np.ndarray:
    """A smooth mask."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7), np.uint8)
    image = Image.fromarray(noise).resize(shape[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image) > 128


def published_boundary(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            right, below = x + 1 < width, y + 1 < height
            here = mask[y, x]
            if right and below:
                found[y, x] = not here == mask[y, x + 1] == mask[y + 1, x] == mask[y + 1, x + 1]
            elif right:
                found[y, x] = here != mask[y, x + 1]
            elif below:
                found[y, x] = here != mask[y + 1, x]
    return found


def published_f(mask, truth, radius):
    edges = [published_boundary(mask), published_boundary(truth)]
    disk = morphology.disk(radius)
    near = [morphology.dilation(edge, disk) for edge in edges]
    precision = (edges[0] & near[1]).sum() / edges[0].sum()
    recall = (edges[1] & near[0]).sum() / edges[1].sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


NOTHING = np.zeros((60, 90), bool)


@pytest.mark.parametrize("seed", range(3))
def test_f_as_published(seed):
    mask, truth = blob(seed), blob(seed + 10)
    np.testing.assert_array_equal(boundary(mask), published_boundary(mask))
    # The diagonal is 108 px: 0.8 % of it is rounded up to one.
    assert boundary_accuracy(mask, truth, NOTHING) == pytest.approx(published_f(mask, truth, 1))
    large = [x.repeat(3, axis=0).repeat(3, axis=1) for x in (mask, truth)]
    void = np.zeros_like(large[0])
    assert boundary_accuracy(*large, void) == pytest.approx(published_f(*large, 3))


@pytest.mark.parametrize("radius", [0, 1, 3, 8, 70])
def test_dilation_by_a_disk(radius):
    mask = np.random.default_rng(0).random((25, 40)) > 0.99
    expected = morphology.dilation(mask, morphology.disk(radius))
    np.testing.assert_array_equal(dilated(mask, radius), expected)


def check_perfect_shifted_empty(truth: np.ndarray) -> None:
    """What J and F must be by definition, for a mask that does not touch the border."""
    nothing = np.zeros_like(truth)
    shifted = np.roll(truth, 12, axis=1)
    for measure in (region_similarity, boundary_accuracy):
        assert measure(truth, truth, nothing) == 1
        assert 0 < measure(shifted, truth, nothing) < 1
        assert measure(nothing, truth, nothing) == 0
        assert measure(truth, nothing, nothing) == 0
        assert measure(nothing, nothing, nothing) == 1
    overlap = (shifted & truth).sum() / (shifted | truth).sum()
    assert region_similarity(shifted, truth, nothing) == overlap


def test_perfect_shifted_empty():
    truth = np.zeros((120, 200), bool)
    truth[30:90, 50:110] = True
    check_perfect_shifted_empty(truth)
    # One px of shift is within the tolerance of a boundary, two of three px are not.
    assert boundary_accuracy(np.roll(truth, 1, axis=0), truth, np.zeros_like(truth)) == 1


def test_void_pixels_do_not_count():
    mask, truth, void = (np.zeros((40, 60), bool) for _ in range(3))
    truth[10:20, 10:30] = True
    mask[10:20, 10:40] = True
    void[:, 30:] = True
    assert region_similarity(mask, truth, void) == boundary_accuracy(mask, truth, void) == 1


def test_statistics_by_hand():
    scores = np.array([0.9, 0.8, 0.6, 0.5, 0.4, 0.2, 0.3, 0.1])
    found = statistics(scores)
    assert found.mean == pytest.approx(0.475) and found.recall == 3 / 8
    # round(linspace(1, 8, 5)) = 1, 3, 4, 6, 8: quarters share their ends.
    assert found.decay == pytest.approx((0.9 + 0.8 + 0.6) / 3 - (0.2 + 0.3 + 0.1) / 3)
    assert statistics(np.array([0.5])) == (0.5, 0.0, 0.0)
    with pytest.raises(ValueError, match="at least one frame"):
        statistics(np.array([]))


@pytest.mark.skipif(
    "DINOV2_JAX_DAVIS" not in os.environ, reason="DINOV2_JAX_DAVIS names a folder of DAVIS' layout"
)
def test_real_masks():
    for clip in open_davis(os.environ["DINOV2_JAX_DAVIS"]):
        masks, _ = read_masks(clip)
        whole = [x == 1 for x in masks if x is not None]
        inside = [x for x in whole if x.any() and not np.roll(x, 12, axis=1)[:, :12].any()]
        assert pathlib.Path(clip.masks[0]).exists() and inside
        for mask in inside[::10]:
            check_perfect_shifted_empty(mask)
