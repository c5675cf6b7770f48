"""The record of a model: sizes of the released ones, and the module that it builds."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dinov2_jax.convert.spec import INTERPOLATIONS, RELEASED, ModelSpec
from dinov2_jax.convert.state_dict import flatten
from dinov2_jax.models import pos_embed
from dinov2_jax.models.vit import VARIANTS
from tests.convert.models import MODELS, make_spec


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_module(name):
    spec = make_spec(name)
    module = spec.build(dtype=jnp.bfloat16)
    assert module.dtype == jnp.bfloat16 and module.num_heads == spec.num_heads
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert {path: leaf.shape for path, leaf in flatten(shapes).items()} == spec.shapes()
    preprocessing = {k: getattr(spec, k) for k in ("mean", "std", "resize_size_px", "crop_size_px")}
    assert ModelSpec.from_module(module, **preprocessing) == spec
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("variant", "hidden_dim", "num_params"),
    [
        ("vit_small", 1536, 22_056_576),
        ("vit_base", 3072, 86_580_480),
        ("vit_large", 4096, 304_368_640),
        ("vit_giant2", 4096, 1_136_480_768),
    ],
)
def test_released_sizes(variant, hidden_dim, num_params):
    spec = make_spec(
        "mlp",
        **VARIANTS[variant],
        hidden_dim=hidden_dim,
        patch_size=14,
        pos_embed_grid=(37, 37),
    )
    assert spec.variant == variant
    assert spec.mlp_ratio == 4
    assert spec.num_params == num_params
    with_registers = dataclasses.replace(spec, num_register_tokens=4)
    assert with_registers.num_params == num_params + 4 * spec.embed_dim


def test_tables_agree_with_the_models():
    assert INTERPOLATIONS == pos_embed.INTERPOLATIONS
    sizes = {(v["embed_dim"], v["depth"], v["ffn"]): name for name, v in VARIANTS.items()}
    assert sizes == RELEASED


def test_hidden_widths():
    assert make_spec(hidden_dim=40).mlp_ratio == 2.5
    assert make_spec(hidden_dim=37).build().mlp_ratio * 16 == pytest.approx(37)
    assert make_spec("swiglu", hidden_dim=56).mlp_ratio > 4
    with pytest.raises(ValueError, match=r"hidden_dim=50 of a swiglu network of width 16 must fol"):
        make_spec("swiglu", hidden_dim=50).build()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"depth": 1}', '{"color": "red"}'])
def test_other_json(text):
    with pytest.raises(ValueError, match="the model's record must be what dinov2_jax wrote"):
        ModelSpec.from_json(text)
