"""The stages of the objective: where each crop lies, what each loss sees, what the total is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax import objective
from dinov2_jax.objective import LossSettings
from tests import tiny


@pytest.fixture(scope="module")
def batch():
    return tiny.make_batch(groups=3, group_size=2)


@pytest.fixture(scope="module")
def views(batch):
    return objective.make_views(batch, augment=tiny.normalise)


@pytest.fixture(scope="module")
def network():
    return tiny.make_network()


@pytest.fixture(scope="module")
def params(network):
    return network.init(jax.random.key(0), image_shape=tiny.IMAGE_SHAPE)


def test_views_bring_groups_to_the_front_and_keep_every_crop(batch, views):
    """Crop v of image q of group s, whose parameters go with it."""
    for s in range(3):
        for q in range(2):
            image = 2 * s + q
            for name in ("global_crops", "local_crops"):
                for v in range(getattr(views, name).shape[1]):
                    expected = tiny.normalise(batch[name][image, v], None)
                    np.testing.assert_array_equal(getattr(views, name)[s, v, q], expected)


def test_each_crop_is_augmented_by_its_own_parameters(batch):
    marked = dict(batch)
    for name, start in (("global_augment", 0), ("local_augment", 1000)):
        numbers = np.arange(batch[name][..., 0].size, dtype=np.float32) + start
        marked[name] = np.zeros_like(batch[name])
        marked[name][..., 0] = numbers.reshape(batch[name].shape[:2])

    def augment(crops, parameters):
        return jnp.broadcast_to(parameters[:, :1, None, None], crops.shape).astype(jnp.float32)

    views = objective.make_views(marked, augment=augment)
    assert views.global_crops[2, 1, 0, 0, 0, 0] == marked["global_augment"][4, 1, 0]
    assert views.local_crops[1, 2, 1, 0, 0, 0] == marked["local_augment"][3, 2, 0]


def test_no_local_crops_leave_an_empty_axis():
    batch = tiny.make_batch(groups=2, num_local=0)
    views = objective.make_views(batch, augment=tiny.normalise)
    assert views.local_crops.shape[:3] == (2, 0, 2)


def test_masked_tokens_are_gathered_inside_their_group():
    patches = jnp.arange(2 * 4 * 3).reshape(8, 3, 1)  # 2 groups of 4 crops of 3 patches
    indices = jnp.array([[0, 11], [5, 5]])
    found = objective.gather_masked(patches, indices)[..., 0]
    np.testing.assert_array_equal(found, [[0, 11], [12 + 5, 12 + 5]])


def test_the_student_alone_sees_masks(network, params, views):
    """Both see the same crops: the first group's unmasked ones give equal features."""
    cls, rows = objective.teacher_rows(params, views, network=network, losses=LossSettings())
    assert (
        rows["dino"].shape[:3] == (3, 2, 2) and rows["ibot"].shape[:2] == views.mask_indices.shape
    )
    key = jax.random.key(0)
    masked, _ = objective.student_features(params, views, key, network=network, has_masks=True)
    plain, _ = objective.student_features(params, views, key, network=network, has_masks=False)
    assert masked.shape[:3] == (3, 2 + tiny.NUM_LOCAL, 2)
    is_masked = views.masks.any(axis=2).reshape(3, 2, 2)
    same = np.isclose(masked[:, :2], cls, rtol=1e-4, atol=1e-4).all(axis=-1)
    np.testing.assert_array_equal(same, ~is_masked)
    np.testing.assert_allclose(plain[:, :2], cls, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(masked[:, 2:], plain[:, 2:], rtol=1e-4, atol=1e-4)


def test_the_total_is_the_weighted_sum_of_its_terms(network, params, views):
    weights = dict(dino_weight=0.5, ibot_weight=2.0, koleo_weight=0.3)
    losses = LossSettings(**weights)
    _, rows = objective.teacher_rows(params, views, network=network, losses=losses)
    centers = {name: jnp.zeros(tiny.NUM_PROTOTYPES) for name in rows}
    targets, _, _ = objective.teacher_targets(
        params,
        rows,
        centers,
        views.mask_weights,
        teacher_temp=0.07,
        network=network,
        losses=losses,
    )
    total, terms = objective.student_loss(
        params, views, targets, jax.random.key(0), network=network, losses=losses
    )
    expected = 0.5 * (terms["dino_global_loss"] + terms["dino_local_loss"])
    expected += 2.0 * terms["ibot_loss"] + 0.3 * terms["koleo_loss"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(terms["total_loss"], total)
