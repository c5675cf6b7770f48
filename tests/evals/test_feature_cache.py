"""Features are computed once for every question, and never for another."""

import numpy as np
import pytest

from dinov2_jax.data.sources import open_source
from dinov2_jax.evals import feature_cache
from dinov2_jax.evals.feature_cache import cached_features
from dinov2_jax.features import extract, folder_store, read


@pytest.fixture
def computed(monkeypatch):
    """Images that each call has computed; shards hold four."""
    counts = []

    def counting(*args, **settings):
        report = extract(*args, shard_size=4, **settings)
        counts.append(report.images)
        return report

    monkeypatch.setattr(feature_cache, "extract", counting)
    return counts


def test_a_second_call_computes_nothing(model, colors, tmp_path, computed):
    first = cached_features(model, str(colors / "val"), tmp_path, quiet=True)
    again = cached_features(model, open_source(str(colors / "val")), tmp_path, quiet=True)
    assert computed == [12, 0]
    np.testing.assert_array_equal(first["cls"][:], again["cls"][:])
    assert len(first) == 12 and first.label_names == ("blue", "green", "red")


def test_another_question_has_a_folder_of_its_own(model, colors, tmp_path):
    source = open_source(str(colors / "val"))
    questions = [{}, {"what": "mean"}, {"crop_size_px": 8}, {"resize_size_px": 30}]
    for settings in questions:
        cached_features(model, source, tmp_path, quiet=True, **settings)
    cached_features(model, str(colors / "test"), tmp_path, quiet=True)
    names = [path.name.rpartition("_")[0] for path in tmp_path.iterdir()]
    assert sorted(names) == ["test_cls", "val_cls", "val_cls", "val_cls", "val_mean"]


def test_features_that_hold_more_will_do(model, colors, tmp_path, computed):
    source = open_source(str(colors / "val"))
    more = cached_features(model, source, tmp_path, what="cls,layers=2", quiet=True)
    cls = cached_features(model, source, tmp_path, quiet=True)
    layers = cached_features(model, source, tmp_path, what="layers=2", quiet=True)
    assert computed == [12]
    np.testing.assert_array_equal(cls["cls"][:], more["cls"][:])
    np.testing.assert_array_equal(layers["layers_cls"][:], more["layers_cls"][:])
    # Not of other layers, other sizes or other images.
    cached_features(model, source, tmp_path, what="layers=1", quiet=True)
    cached_features(model, source, tmp_path, crop_size_px=8, quiet=True)
    cached_features(model, str(colors / "test"), tmp_path, quiet=True)
    assert computed == [12, 12, 12, 12]


def test_a_killed_run_goes_on(model, colors, tmp_path, computed, monkeypatch):
    """As kill -9 would: the second shard is never put in its place."""

    class Killed(BaseException):
        pass

    rename = folder_store.os.rename

    def rename_or_die(a, b):
        if b.name.startswith("shard-00001"):
            raise Killed
        rename(a, b)

    monkeypatch.setattr(folder_store.os, "rename", rename_or_die)
    with pytest.raises(Killed):
        cached_features(model, str(colors / "val"), tmp_path / "part", quiet=True)
    (folder,) = (tmp_path / "part").iterdir()
    with pytest.raises(ValueError, match="1 of 3 shards are there"):
        read(folder)
    monkeypatch.setattr(folder_store.os, "rename", rename)
    found = cached_features(model, str(colors / "val"), tmp_path / "part", quiet=True)
    assert computed == [8]
    whole = cached_features(model, str(colors / "val"), tmp_path / "whole", quiet=True)
    np.testing.assert_array_equal(found["cls"][:], whole["cls"][:])
