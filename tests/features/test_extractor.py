"""Features of a stream of images: order, padding, one compilation, sharded parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.features.extractor import FeatureExtractor, cls_and_mean_patch
from dinov2_jax.models.vit import BackboneOutput, VisionTransformer
from dinov2_jax.sharding import make_mesh, tree_sharding

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 14, 14, 3), np.uint8)


def rows_and_columns(scale, images):
    """A network whose tokens are known: CLS the mean pixel, patches the image rows."""
    rows = scale * images.mean(axis=2)  # [b, height, c]
    return BackboneOutput(cls=rows.mean(axis=1), registers=rows[:, :0], patches=rows**2)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_features_are_those_of_each_image(images, batch_size):
    compute = FeatureExtractor(
        cls_and_mean_patch(rows_and_columns), mean=MEAN, std=STD, batch_size=batch_size
    )
    found = compute(np.float32(2), iter(images))
    normal = (images.astype(np.float64) / 255 - MEAN) / STD
    rows = 2 * normal.mean(axis=2)
    np.testing.assert_allclose(found["cls"], rows.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["mean_patch"], (rows**2).mean(axis=1), rtol=1e-4)


def test_one_image_shape_is_compiled_once(images):
    traced = []

    def apply(params, x):
        traced.append(x.shape)
        return rows_and_columns(params, x)

    compute = FeatureExtractor(cls_and_mean_patch(apply), mean=MEAN, std=STD, batch_size=4)
    for scale in (1.0, 2.0):
        compute(np.float32(scale), images)
    compute(np.float32(1.0), images[:2])
    assert traced == [(4, 14, 14, 3)]


def test_features_of_a_bfloat16_network_are_averaged_in_float32(images):
    def apply(params, x):
        patches = jnp.ones((len(x), 1000, 2), jnp.bfloat16).at[:, 0].set(params)
        return BackboneOutput(cls=patches[:, 0], registers=patches[:, :0], patches=patches)

    found = FeatureExtractor(cls_and_mean_patch(apply), mean=MEAN, std=STD, batch_size=4)(
        jnp.bfloat16(3), images
    )
    assert found["cls"].dtype == found["mean_patch"].dtype == np.float32
    np.testing.assert_allclose(found["mean_patch"], 1.002, rtol=1e-6)  # 1 in bfloat16


@pytest.mark.parametrize("batch_size", [8, 3])  # cut over the batch shards, or replicated
def test_sharded_parameters_give_the_same_features(images, batch_size):
    network = VisionTransformer(
        patch_size=7, embed_dim=32, depth=1, num_heads=2, pos_embed_grid=(2, 2)
    )
    params = jax.jit(network.init)(jax.random.key(0), images[:1].astype(np.float32))["params"]

    def apply(params, x):
        return network.apply({"params": params}, x)

    expected = FeatureExtractor(cls_and_mean_patch(apply), mean=MEAN, std=STD, batch_size=4)(
        params, images
    )
    mesh = make_mesh(data=2, fsdp=4)
    shardings = tree_sharding(params, mesh, min_size_to_shard_mb=0)
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(shardings))
    sharded = jax.device_put(params, shardings)
    compute = FeatureExtractor(
        cls_and_mean_patch(apply), mean=MEAN, std=STD, batch_size=batch_size, mesh=mesh
    )
    found = compute(sharded, images)
    np.testing.assert_allclose(found["cls"], expected["cls"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["mean_patch"], expected["mean_patch"], rtol=1e-5, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        FeatureExtractor(cls_and_mean_patch(rows_and_columns), mean=MEAN, std=STD, batch_size=0)
    with pytest.raises(ValueError, match="at least one image"):
        FeatureExtractor(cls_and_mean_patch(rows_and_columns), mean=MEAN, std=STD)(
            np.float32(1), []
        )


def test_batches_stream_through_with_the_next_one_sent_before(images):
    taken = []

    def batches():
        for batch in ([], images[:4], [], images[4:5]):
            taken.append(len(batch))
            yield batch

    compute = FeatureExtractor(
        cls_and_mean_patch(rows_and_columns), mean=MEAN, std=STD, batch_size=4
    )
    stream = compute.stream(np.float32(2), batches())
    assert next(stream) == {} and taken == [0, 4]
    found = [next(stream)["cls"], next(stream), next(stream)["cls"]]
    assert taken == [0, 4, 0, 1] and found[1] == {}
    expected = compute(np.float32(2), images[:5])["cls"]
    np.testing.assert_array_equal(np.concatenate([found[0], found[2]]), expected)
