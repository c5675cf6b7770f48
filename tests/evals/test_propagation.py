"""Label propagation against loops over patches, and videos whose masks are known."""

import numpy as np
import pytest

from dinov2_jax.evals.propagation import (
    labels_from_mask,
    labels_of_neighbors,
    mask_from_labels,
    propagate,
)

H, W, D, C = 4, 5, 6, 3


def loops(current, frames, k, radius, temperature):
    """Every patch by itself: frames are (features, labels)."""
    found = np.zeros((H, W, C))
    for y in range(H):
        for x in range(W):
            weighted = []
            for features, labels in frames:
                for v in range(H):
                    for u in range(W):
                        if radius and max(abs(v - y), abs(u - x)) > radius:
                            continue
                        a, b = current[y, x].astype(float), features[v, u].astype(float)
                        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
                        weighted.append((np.exp(cosine / temperature), labels[v, u]))
            weighted = sorted(weighted, key=lambda pair: -pair[0])[:k]
            total = sum(weight for weight, _ in weighted)
            found[y, x] = sum(weight * label for weight, label in weighted) / total
    return found


@pytest.fixture(scope="module")
def video():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((6, H, W, D)).astype(np.float32)
    labels = np.eye(C, dtype=np.float32)[rng.integers(0, C, (H, W))]
    return features, labels


@pytest.mark.parametrize("k, radius, num_context", [(5, 1, 2), (3, 0, 7), (200, 2, 1)])
def test_against_loops(video, k, radius, num_context):
    features, first = video
    settings = dict(num_neighbors=k, radius=radius, temperature=0.1)
    found = list(propagate(features, first, num_context=num_context, **settings))
    frames = [(features[0], first)]
    for current, ours in zip(features[1:], found, strict=True):
        expected = loops(current, [frames[0], *frames[1:][-num_context:]], k, radius, 0.1)
        np.testing.assert_allclose(ours, expected, atol=2e-5)
        np.testing.assert_allclose(ours.sum(axis=-1), 1, rtol=1e-5)
        frames.append((current, ours))


def test_equals_of_the_last_neighbour_count_too():
    features = np.ones((1, H, W, D), np.float32)
    labels = np.eye(C, dtype=np.float32)[np.arange(H * W).reshape(H, W) % C]
    found = labels_of_neighbors(
        features[0], features, labels[None], np.array([True]),
        num_neighbors=2, radius=0, temperature=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(found[1, 2], labels.mean(axis=(0, 1)), rtol=1e-5)


def test_a_moving_square_is_followed():
    """Features that are the colours of a scene in which an object moves a patch a frame."""
    rng = np.random.default_rng(1)
    ground, thing = rng.standard_normal((2, 16))
    masks = np.zeros((9, 6, 14), int)
    for i, mask in enumerate(masks):
        mask[2:4, i + 1 : i + 4] = 1
    features = np.where(masks[..., None], thing, ground) + 0.1 * rng.standard_normal(
        (*masks.shape, 16)
    )
    first = labels_from_mask(
        masks[0].astype(np.uint8).repeat(5, axis=0).repeat(5, axis=1), num_objects=1, grid=(6, 14)
    )
    np.testing.assert_array_equal(first.argmax(axis=-1), masks[0])
    for mask, labels in zip(masks[1:], propagate(features, first), strict=True):
        found = mask_from_labels(labels, patch_size=5, shape=(60, 140))
        assert found.dtype == np.uint8
        # Away from the outline, where interpolation decides.
        np.testing.assert_array_equal(found[5::10, 5::10], mask)


def test_masks_are_read_at_the_nearest_pixel_and_strangers_are_background():
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:] = 2
    mask[4:] = 7
    labels = labels_from_mask(mask, num_objects=2, grid=(2, 4))
    np.testing.assert_array_equal(labels.argmax(axis=-1), [[0, 0, 2, 2], [0, 0, 0, 0]])
    assert labels.shape == (2, 4, 3)


def test_faint_classes_are_stretched_before_the_largest_is_taken():
    labels = np.zeros((3, 3, 2), np.float32)
    labels[..., 0] = 0.9
    labels[1, 1] = [0.7, 0.3]
    found = mask_from_labels(labels, patch_size=4, shape=(12, 12))
    assert found[5, 5] == 1 and found[0, 0] == 0
    everywhere = np.ones((3, 3, 1), np.float32)
    assert (mask_from_labels(everywhere, patch_size=2, shape=(3, 3)) == 0).all()
