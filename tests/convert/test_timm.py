"""timm's layout: tiny models of timm 1.0.31 (golden values), and the way back."""

import functools

import jax
import numpy as np
import pytest

from dinov2_jax.convert.read import recognise
from dinov2_jax.convert.state_dict import load, to_reference
from dinov2_jax.convert.timm import from_timm, to_timm
from tests.convert.models import make_params, make_spec
from tests.reference.golden_values import arrays
from tests.reference.make_timm_golden import SIZES

# Relative to the largest entry, in float32. Measured: 1e-6 at most.
TOLERANCE = 1e-5


@functools.cache
def golden(name):
    values = {k: v for k, v in arrays("timm_tiny.npz").items() if k.startswith(f"{name}/")}
    start = f"{name}/param/"
    flat = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
    tokens = {k.split("/")[1]: v for k, v in values.items() if k.endswith("tokens")}
    return flat, tokens


@pytest.mark.parametrize("name", ["plain", "reg4", "swiglu"])
def test_tokens(name):
    flat, tokens = golden(name)
    source = recognise(flat, num_heads=2, interpolation="timm")
    assert source.spec.pos_embed_grid == (7, 7)
    assert source.spec.num_register_tokens == (4 if name == "reg4" else 0)
    assert source.spec.ffn == ("swiglu" if name == "swiglu" else "mlp")
    params = load(source.params["backbone"])
    apply = jax.jit(source.spec.build().apply)
    for height, width in SIZES:
        rng = np.random.default_rng(height * 1000 + width)
        images = rng.standard_normal((1, 3, height, width)).astype(np.float32)
        output = apply({"params": params}, images.transpose(0, 2, 3, 1))
        ours = np.concatenate([output.cls[:, None], output.registers, output.patches], axis=1)
        theirs = tokens[f"{height}x{width}"]
        assert ours.shape == theirs.shape
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < TOLERANCE, (height, width, error)


@pytest.mark.parametrize("name", ["plain", "reg4", "swiglu"])
def test_theirs_to_ours_to_theirs_is_exact(name):
    flat, _ = golden(name)
    params = load(recognise(flat, num_heads=2).params["backbone"])
    back, _ = to_timm(to_reference(params))
    assert back.keys() == flat.keys()
    for key, array in flat.items():
        assert np.asarray(back[key]).tobytes() == array.tobytes(), key


def test_folding_the_cls_position_changes_no_output():
    spec = make_spec("registers")
    params = make_params(spec)
    folded, lost = to_timm(to_reference(params))
    assert folded["pos_embed"].shape == (1, 9, 16) and len(lost) == 2
    again = load(recognise(folded, num_heads=2).params["backbone"])
    images = np.random.default_rng(0).standard_normal((1, 8, 12, 3)).astype(np.float32)
    apply = jax.jit(spec.build().apply)
    one, two = (apply({"params": p}, images) for p in (params, again))
    np.testing.assert_allclose(one.cls, two.cls, atol=1e-6)
    np.testing.assert_allclose(one.patches, two.patches, atol=1e-6)


def test_a_negative_zero_survives():
    flat, _ = golden("reg4")
    flat = flat | {"cls_token": -np.zeros_like(flat["cls_token"])}
    back, _ = to_timm(to_reference(load(recognise(flat, num_heads=2).params["backbone"])))
    assert np.signbit(back["cls_token"]).all()


def test_names_that_timm_does_not_have_stay_for_the_error():
    assert "head.weight" in from_timm({"head.weight": np.zeros((3, 16), np.float32)})
