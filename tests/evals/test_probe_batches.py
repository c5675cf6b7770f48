"""Features for a probe: cached rows in a shuffled order, and random crops through the network."""

import numpy as np
import pytest

from dinov2_jax.data.records import BadImage
from dinov2_jax.data.sources import open_source
from dinov2_jax.evals import probe_batches
from dinov2_jax.evals.feature_cache import cached_features
from dinov2_jax.evals.probe_batches import (
    AugmentedBatches,
    CachedBatches,
    probe_features,
    probe_pieces,
    what_for,
)
from tests.evals.stand_ins import ListSource, colored_source


@pytest.fixture(scope="module")
def features(model, colors, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return cached_features(model, str(colors / "train"), cache, what=what_for(2), quiet=True)


def test_features_are_class_tokens_then_the_last_mean(features, model):
    found = probe_features(features.arrays)
    cls, mean = np.asarray(features["layers_cls"]), np.asarray(features["layers_mean"])
    assert found.shape == (24, 3 * 16)
    np.testing.assert_array_equal(found, np.concatenate([cls[:, 0], cls[:, 1], mean[:, 1]], -1))
    np.testing.assert_array_equal(np.concatenate(list(probe_pieces(features))), found)


def test_cached_batches_are_passes_over_all_rows(features):
    batches = CachedBatches(features, features.labels, seed=0)
    all_features = probe_features(features.arrays)
    x, y = batches(np.arange(48).reshape(6, 8))
    assert x.shape == (6, 8, 48) and y.shape == (6, 8) and y.dtype == np.int32
    rows = [np.flatnonzero((all_features == row).all(axis=1)) for row in x.reshape(48, -1)]
    assert all(len(row) == 1 for row in rows)
    rows = np.concatenate(rows)
    np.testing.assert_array_equal(y.ravel(), features.labels[rows])
    for each in (rows[:24], rows[24:]):
        np.testing.assert_array_equal(np.sort(each), np.arange(24))
    assert (rows[:24] != rows[24:]).any()
    np.testing.assert_array_equal(batches(np.array([[7]]))[0][0, 0], x.reshape(48, -1)[7])


def make_augmented(model, source, **changes):
    settings = dict(num_layers=2, crop_size_px=12, per_device_batch_size=1, num_threads=2, seed=0)
    return AugmentedBatches(model, source, **settings | changes)


def test_augmented_batches_depend_on_the_position_alone(model, colors):
    batches = make_augmented(model, open_source(str(colors / "train")))
    x, y = batches(np.arange(24).reshape(3, 8))
    assert x.shape == (3, 8, 48) and sorted(y.ravel()) == sorted([0, 1, 2] * 8)
    again, labels = batches(np.array([[17, 3]]))
    np.testing.assert_allclose(again[0], x.reshape(24, -1)[[17, 3]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(labels[0], y.ravel()[[17, 3]])
    other, _ = make_augmented(model, open_source(str(colors / "train")), seed=1)(np.arange(8))
    assert not np.allclose(other, x[0], atol=1e-3)


def test_labels_that_are_none_are_refused(model):
    image = np.zeros((20, 20, 3), np.uint8)
    batches = make_augmented(model, ListSource([image] * 2, ["a", "b"], [-1, 0], ("x", "y")))
    with pytest.raises(ValueError, match=r"labels of .* are none, such as -1"):
        batches(np.arange(4))


def test_crops_are_random_and_flipped(model, monkeypatch):
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))
    batches = make_augmented(model, ListSource([ramp] * 2, ["a", "b"], [0, 1], ("x", "y")))
    crops = [batches._read(position)[0] for position in range(200)]
    spans = np.array([np.ptp(crop[..., 0]) for crop in crops])
    # A side is sqrt(area * ratio) of 200 px: area 0.08 to 1, ratio 3/4 to 4/3.
    assert 35 < spans.min() < 70 and spans.max() > 180
    falling = np.mean([crop[0, 0, 0] > crop[0, -1, 0] for crop in crops])
    assert 0.35 < falling < 0.65


def test_an_unreadable_image_is_replaced(model, monkeypatch):
    source = colored_source(6)
    source.records[2] = source.records[2]._replace(image=BadImage("gone"))
    _, labels = make_augmented(model, source)(np.arange(6))
    assert labels.shape == (6,)
    broken = ListSource([b"broken"] * 2, ["a", "b"], [0, 1], ("x", "y"))
    monkeypatch.setattr(probe_batches, "_NUM_TRIES", 3)
    with pytest.raises(ValueError, match=r"3 images in a row of 2 images in 2 classes .*repair"):
        make_augmented(model, broken)(np.arange(2))
