"""Videos from frames, read as the probe reads them."""

import dataclasses

import numpy as np
import pytest

from dinov2_jax.evals.pooled_frames import pool_frames
from dinov2_jax.features.read import FeatureSet, ShardedArray


@pytest.fixture
def features():
    """Four videos of three frames, of which the second lacks a frame; [rows, 2 layers, 5]."""
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((12, 2, 5)).astype(np.float32)
    ids = np.delete(np.arange(12), 4)
    shards = ShardedArray([whole[ids[:6]], whole[ids[6:]]], (2, 5), np.float32)
    paths = [f"v{i // 3}#{i % 3}" for i in ids]
    return FeatureSet({"layers_cls": shards}, ids, paths, None, (), {}), whole


@pytest.mark.parametrize("pooling", ["mean", "concat"])
def test_videos_without_all_their_frames_are_left_out(features, pooling):
    features, whole = features
    found, labels = pool_frames(
        features, np.array([3, 1, 4, 1]), frames_per_video=3, pooling=pooling
    )
    assert found.paths == ["v0", "v2", "v3"] and labels.tolist() == [3, 4, 1] and len(found) == 3
    videos = whole.reshape(4, 3, 2, 5)[[0, 2, 3]]
    if pooling == "mean":
        expected = videos.mean(axis=1)
    else:
        expected = np.stack([np.concatenate(list(v), axis=-1) for v in videos])
    array = found["layers_cls"]
    assert array.shape == expected.shape
    for key in (slice(0, 2), np.array([[2, 0], [1, 1]]), (slice(None), -1), (np.array([1]), -1)):
        np.testing.assert_allclose(array[key], expected[key], rtol=1e-6)
    assert dataclasses.is_dataclass(found)
