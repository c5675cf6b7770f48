"""Shapes of heads beside a backbone."""

import jax
import jax.numpy as jnp
import pytest

from dinov2_jax.convert.heads import head_shapes
from dinov2_jax.convert.state_dict import flatten, to_reference
from dinov2_jax.models.heads import DINOHead


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_projection_heads(num_layers):
    head = DINOHead(6, hidden_dim=5, bottleneck_dim=3, num_layers=num_layers)
    params = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 8)))["params"]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), params)
    shapes = {
        name.removeprefix("dino_head."): array.shape
        for name, array in to_reference({"dino_head": zeros}).items()
    }
    expected = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert head_shapes("dino_head", shapes, 8) == expected
    # A width that contradicts the backbone's is named at the layer that has it.
    first = "mlp/kernel" if num_layers == 1 else "mlp/0/kernel"
    assert head_shapes("dino_head", shapes, 9)[first] != expected[first]


@pytest.mark.parametrize(("width", "inputs"), [(16, 16), (40, 40), (17, 16), (8, 16), (39, 40)])
def test_classifier(width, inputs):
    shapes = head_shapes("linear_head", {"weight": (7, width), "bias": (7,)}, 8)
    assert shapes == {"kernel": (inputs, 7), "bias": (7,)}
