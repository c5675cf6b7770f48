"""The transformer against goldens of the reference: registers, both interpolations, masks.

The package that the live parity tests use has no registers; these values come from the later code.
"""

import functools

import jax
import numpy as np
import pytest

from dinov2_jax.convert.state_dict import from_reference
from dinov2_jax.models.vit import VisionTransformer
from tests.reference.golden_values import arrays

# Relative to the largest entry, in float32. Measured: 1e-6 at most.
TOLERANCE = 5e-6

SETTINGS = {
    "vit_mlp": {},
    "vit_swiglu": dict(ffn="swiglu"),
    "vit_reg4": dict(num_register_tokens=4, interpolation="antialias"),
    "vit_patch16": dict(patch_size=16, pos_embed_grid=(14, 14)),
}


@functools.cache
def load(file_name):
    """The golden values, the model and its parameters."""
    golden = arrays(f"{file_name}.npz")
    sizes = dict(patch_size=14, embed_dim=48, depth=3, num_heads=3, pos_embed_grid=(37, 37))
    model = VisionTransformer(**(sizes | SETTINGS[file_name]))
    names = {name[6:]: array for name, array in golden.items() if name.startswith("param/")}
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    template = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return golden, model, {"params": from_reference(names, template=template)}


def make_images(height, width):
    rng = np.random.default_rng(height * 1000 + width)
    return rng.standard_normal((1, 3, height, width)).astype(np.float32).transpose(0, 2, 3, 1)


def assert_close(ours, golden, what):
    assert ours.shape == golden.shape, what
    if golden.size:
        error = np.abs(np.asarray(ours) - golden).max() / np.abs(golden).max()
        assert error < TOLERANCE, f"{what}: {error}"


@pytest.mark.parametrize(
    ("file_name", "size"),
    [
        ("vit_mlp", "98x98"),
        ("vit_mlp", "224x224"),
        ("vit_mlp", "518x518"),
        ("vit_mlp", "546x602"),
        ("vit_swiglu", "224x224"),
        ("vit_reg4", "98x98"),
        ("vit_reg4", "392x518"),
        ("vit_reg4", "518x518"),
        ("vit_patch16", "96x96"),
        ("vit_patch16", "224x320"),
    ],
)
def test_outputs_and_intermediate_layers(file_name, size):
    golden, model, params = load(file_name)
    images = make_images(*map(int, size.split("x")))
    # The last intermediate layer, normalised, is the output: one compilation serves all.
    layers = jax.jit(functools.partial(model.apply, method="intermediate_layers"), static_argnums=2)
    first, last = layers(params, images, (0, 2))
    assert_close(last.cls, golden[f"{size}/cls"], "cls")
    assert_close(last.registers, golden[f"{size}/registers"], "registers")
    assert_close(last.patches[:, ::7], golden[f"{size}/patches_every7"], "patches")
    assert_close(last.patches.mean(axis=1), golden[f"{size}/patches_mean"], "mean patch")
    assert_close(first.cls, golden[f"{size}/layer0_cls"], "cls of block 0")
    assert_close(last.patches.mean(axis=1), golden[f"{size}/layer2_patches_mean"], "block 2")


def test_masked_forward():
    golden, model, params = load("vit_mlp")
    output = jax.jit(model.apply)(params, make_images(224, 224), golden["masked224/mask"])
    assert_close(output.cls, golden["masked224/cls"], "cls")
    assert_close(output.patches[:, ::7], golden["masked224/patches_every7"], "patches")
