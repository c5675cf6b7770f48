"""What the heads do beyond PyTorch's numbers, which tests/convert/test_task_heads.py has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.models.task_heads import DPTHead, LinearDepthHead, LinearHead, SegmentationHead
from dinov2_jax.models.vit import BackboneOutput

GRID = (2, 3)


def make_outputs(count, width=4, batch=5):
    keys = jax.random.split(jax.random.key(0), (count, 2))
    n = GRID[0] * GRID[1]
    return [
        BackboneOutput(
            cls=jax.random.normal(one, (batch, width)),
            registers=jnp.zeros((batch, 0, width)),
            patches=3 + 2 * jax.random.normal(two, (batch, n, width)),
        )
        for one, two in keys
    ]


def test_classifier_ignores_the_order_of_patches_but_not_of_layers():
    head, outputs = LinearHead(3), make_outputs(2)
    variables = head.init(jax.random.key(1), outputs)
    assert variables["params"]["kernel"].shape == (3 * 4, 3)
    logits = head.apply(variables, outputs)
    shuffled = [o.replace(patches=o.patches[:, ::-1]) for o in outputs]
    np.testing.assert_allclose(head.apply(variables, shuffled), logits, atol=1e-6)
    assert np.abs(head.apply(variables, outputs[::-1]) - logits).max() > 1e-3


def test_segmentation_statistics_are_learned():
    head, outputs = SegmentationHead(3), make_outputs(2)
    variables = head.init(jax.random.key(1), outputs, GRID)
    assert head.apply(variables, outputs, GRID).shape == (5, *GRID, 3)
    _, new = head.apply(variables, outputs, GRID, train=True, mutable="batch_stats")
    mean = np.concatenate([o.patches for o in outputs], axis=-1).mean(axis=(0, 1))
    np.testing.assert_allclose(new["batch_stats"]["bn"]["mean"], 0.1 * mean, atol=1e-6)


def test_linear_depth_stays_in_its_range_and_is_uniform_without_evidence():
    head, outputs = LinearDepthHead(0.5, 4.5, num_bins=5), make_outputs(1)
    variables = head.init(jax.random.key(1), outputs, GRID)
    depth = head.apply(jax.tree.map(lambda x: 100 * x, variables), outputs, GRID)
    assert depth.shape == (5, 8, 12)
    assert depth.min() >= 0.5 and depth.max() <= 4.5 and depth.std() > 0.01
    depth = head.apply(jax.tree.map(jnp.zeros_like, variables), outputs, GRID)
    np.testing.assert_allclose(depth, 2.5, rtol=1e-6)


def test_dpt_needs_four_layers_and_rounds_odd_grids_up():
    head = DPTHead(min_depth=0.1, channels=(2, 2, 2, 2), fusion_dim=2, output_dims=(2, 2))
    outputs = make_outputs(4)
    depth, _ = head.init_with_output(jax.random.key(1), outputs, GRID)
    assert depth.shape == (5, 32, 64)
    assert depth.min() >= 0.1
    with pytest.raises(ValueError, match=r"len\(outputs\)=3 must be 4"):
        head.init(jax.random.key(1), outputs[:3], GRID)
