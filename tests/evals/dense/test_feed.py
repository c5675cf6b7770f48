"""Batches of random views and of cached ones: the network's own features, in the run's order."""

import numpy as np
import pytest

from dinov2_jax.evals.dense.devices import Devices
from dinov2_jax.evals.dense.feed import ViewSource, cached_batches, cached_what, random_batches
from dinov2_jax.evals.dense.heads import depth_head, segmentation_head
from dinov2_jax.evals.dense.mask_sets import open_mask_set
from dinov2_jax.evals.dense.mask_views import fixed_view
from dinov2_jax.evals.dense.predict import normalise
from dinov2_jax.evals.dense.train import image_numbers
from dinov2_jax.evals.feature_cache import cached_features
from tests.evals.dense.models import tiny
from tests.evals.dense.small_sets import save_masks

CROP_PX = 28


def view(image, classes):
    return fixed_view(image, classes, short_side_px=CROP_PX, crop_px=CROP_PX)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    dataset = open_mask_set(str(save_masks(tmp_path_factory.mktemp("masks"))), ("train",))
    return tiny(), dataset, tmp_path_factory.mktemp("cache")


def assert_outputs(outputs, images, model, head):
    normalised = np.stack([normalise(x, model.spec.mean, model.spec.std) for x in images])
    expected = model.intermediate_layers(normalised, head.layers, norm=head.norm)
    for ours, theirs in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(ours.patches, theirs.patches, atol=2e-5)
        np.testing.assert_allclose(ours.cls, theirs.cls, atol=2e-5)


def test_random_views_go_through_the_network(setting):
    model, dataset, _ = setting
    head = segmentation_head(model, "linear", 3)

    def shifted(image, classes, rng):
        image, classes = view(image, classes)
        shift = int(rng.integers(0, CROP_PX))
        image = normalise(np.roll(image, shift, axis=1), model.spec.mean, model.spec.std)
        return image, np.roll(classes, shift, axis=1)

    settings = dict(batch_size=5, images_at_once=2, seed=3, num_threads=2, devices=Devices())
    batches = random_batches(dataset, shifted, model, head, **settings)
    stream = batches(0)
    found = [next(stream) for _ in range(3)]
    later = next(batches(2))
    np.testing.assert_array_equal(later[1], found[2][1])
    np.testing.assert_array_equal(later[0][0].patches, found[2][0][0].patches)
    shifts = {}
    for step, (outputs, targets) in enumerate(found):
        images = []
        numbers = image_numbers(step, batch_size=5, num_images=len(dataset), seed=3)
        for number, target in zip(numbers, targets, strict=True):
            image, classes = view(*dataset.read(number))
            turned = [np.roll(classes, i, axis=1) for i in range(CROP_PX)]
            shift = next(i for i in range(CROP_PX) if (turned[i] == target).all())
            images.append(np.roll(image, shift, axis=1))
            shifts.setdefault(number, []).append(shift)
        assert_outputs(outputs, images, model, head)
    # 15 views of 6 images: the next view of an image is another one, but for chance.
    assert sum(len(set(x)) for x in shifts.values()) >= 13


@pytest.mark.parametrize("protocol", ["linear", "linear4"])
def test_cached_views_are_those_of_the_network(setting, protocol):
    model, dataset, cache = setting
    if protocol == "linear":
        head = segmentation_head(model, protocol, 3)
    else:
        head = depth_head(model, protocol, (0.1, 9.0))
    source = ViewSource(dataset, view, at="here", settings="28 28")
    features = cached_features(
        model,
        source,
        cache,
        what=cached_what(head),
        norm=head.norm,
        resize_size_px=CROP_PX,
        crop=False,
        quiet=True,
    )
    settings = dict(batch_size=4, seed=0, devices=Devices())
    outputs, targets = next(cached_batches(dataset, view, features, head, **settings)(2))
    numbers = image_numbers(2, batch_size=4, num_images=len(dataset), seed=0)
    pairs = [view(*dataset.read(number)) for number in numbers]
    np.testing.assert_array_equal(targets, [classes for _, classes in pairs])
    assert_outputs(outputs, [image for image, _ in pairs], model, head)


def test_sources_of_other_views_have_other_names(setting):
    _, dataset, _ = setting
    names = {ViewSource(dataset, view, at="here", settings=x).name(0) for x in ("28 28", "56 28")}
    assert len(names) == 2
