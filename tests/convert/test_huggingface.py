"""Folders of transformers against the live library, offline, both ways."""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest

from dinov2_jax.convert import read_model, write_model
from dinov2_jax.convert.huggingface import from_huggingface, to_huggingface
from dinov2_jax.convert.read import recognise
from dinov2_jax.convert.spec import ModelSpec
from dinov2_jax.convert.state_dict import ConversionError, to_reference
from tests.convert.models import make_params, make_spec
from tests.parity import require

# Relative to the largest entry, in float32. Measured: 1e-6 at most.
TOLERANCE = 1e-5
SIZES = [(224, 224), (98, 98), (126, 196), (70, 70)]


@pytest.fixture
def transformers(monkeypatch):
    """The library, without network and without its progress bars."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    _, library = require("torch", "transformers")
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    return library


def make(transformers, *, registers=0, swiglu=False, classes=None):
    """A tiny model of transformers with random weights."""
    torch = require("torch")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    settings = dict(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=126,
        patch_size=14,
        use_swiglu_ffn=swiglu,
    )
    if registers:
        settings["num_register_tokens"] = registers
    if classes:
        settings["num_labels"] = classes
    config = getattr(transformers, f"{kind}Config")(**settings)
    suffix = "ForImageClassification" if classes else "Model"
    torch.manual_seed(0)
    model = getattr(transformers, kind + suffix)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@functools.cache
def apply(spec: ModelSpec):
    return jax.jit(spec.build().apply)


def assert_same_tokens(spec, params, model, size):
    torch = require("torch")
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(images).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    output = apply(spec)({"params": params}, images)
    ours = np.concatenate([output.cls[:, None], output.registers, output.patches], axis=1)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < TOLERANCE, (size, error)


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", [{}, dict(registers=4, swiglu=True)])
def test_theirs_to_ours(settings, size, transformers, tmp_path):
    model = make(transformers, **settings)
    model.save_pretrained(tmp_path)
    spec, params = read_model(tmp_path, interpolation="huggingface")
    assert spec.num_heads == 3  # not width / 64
    assert spec.interpolation == ("antialias" if settings else "plain")
    assert_same_tokens(spec, params, model, size)


@pytest.mark.parity
def test_their_rule_is_not_the_references(transformers, tmp_path):
    """Away from the table's size, models without registers differ: the switch matters."""
    model = make(transformers)
    model.save_pretrained(tmp_path)
    spec, params = read_model(tmp_path)
    assert spec.interpolation == "offset"
    with pytest.raises(AssertionError):
        assert_same_tokens(spec, params, model, (224, 224))
    assert_same_tokens(spec, params, model, (126, 126))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["switch", "registers", "registers_swiglu", "swiglu"])
def test_ours_to_theirs(name, transformers, tmp_path):
    spec = make_spec(name)
    params = make_params(spec)
    write_model(tmp_path / "hf", spec, params, format="hf")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    rule = "antialias" if spec.num_register_tokens else "plain"
    spec = dataclasses.replace(spec, interpolation=rule)
    for size in ((12, 12), (8, 20)):
        assert_same_tokens(spec, params, model, size)


@pytest.mark.parity
@pytest.mark.parametrize("registers", [0, 4])
def test_classifier(registers, transformers, tmp_path):
    torch = require("torch")
    model = make(transformers, registers=registers, classes=7)
    model.save_pretrained(tmp_path / "theirs")
    spec, params = read_model(tmp_path / "theirs", with_heads=True, interpolation="huggingface")
    write_model(tmp_path / "ours", spec, params, format="hf")
    name = type(model).__name__
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key

    from dinov2_jax.models.task_heads import LinearHead

    images = np.random.default_rng(0).standard_normal((2, 126, 126, 3)).astype(np.float32)
    output = apply(spec)({"params": params["backbone"]}, images)
    logits = LinearHead(7).apply({"params": params["linear_head"]}, [output])
    with torch.no_grad():
        theirs = model(torch.tensor(images).permute(0, 3, 1, 2)).logits.numpy()
    np.testing.assert_allclose(logits, theirs, atol=1e-5 * np.abs(theirs).max())


def test_names_go_back_to_what_they_were():
    for name in ("mlp", "registers_swiglu"):
        flat = to_reference(make_params(make_spec(name)))
        back, problems = from_huggingface(to_huggingface(flat))
        assert problems == [] and back.keys() == flat.keys()
        for key, array in flat.items():
            np.testing.assert_array_equal(back[key], array)


def test_queries_keys_and_values_keep_their_order():
    flat = to_reference(make_params(make_spec("switch")))
    theirs = to_huggingface(flat)
    weight = flat["blocks.0.attn.qkv.weight"]
    for i, third in enumerate(("query", "key", "value")):
        name = f"encoder.layer.0.attention.attention.{third}.weight"
        np.testing.assert_array_equal(theirs[name], weight[16 * i : 16 * (i + 1)])


def test_problems():
    flat = to_huggingface(to_reference(make_params(make_spec("registers"))))
    layer = "encoder.layer.0.attention.attention"
    del flat[f"{layer}.key.bias"]
    flat[f"{layer}.query.weight"] = np.zeros((15, 16), np.float32)
    flat["encoder.layer.1.lora.a"] = flat["pooler.weight"] = np.zeros(3)
    del flat["layernorm.bias"]
    with pytest.raises(ConversionError) as caught:
        recognise(flat)
    found = caught.value.problems
    for problem in (
        "encoder.layer.1.lora.a has no rule",
        "pooler.weight has no rule",
        "blocks.0.attn.qkv.bias needs query, key and value of one shape, not ['query', 'value']",
        "backbone.norm.bias is missing",
    ):
        assert problem in found or problem.replace("backbone.", "") in found, found
    assert any("blocks.0.attn.qkv.weight needs query" in problem for problem in found)


@pytest.mark.parity
def test_preprocessor_is_theirs(transformers, tmp_path):
    spec = make_spec("switch")
    write_model(tmp_path / "hf", spec, make_params(spec), format="hf")
    from transformers import BitImageProcessorPil

    processor = BitImageProcessorPil.from_pretrained(tmp_path / "hf")
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    pixels = processor(image, return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, spec.crop_size_px, spec.crop_size_px)
    low, high = ((x - np.array(spec.mean)) / np.array(spec.std) for x in (0, 1))
    assert (pixels.min(axis=(0, 2, 3)) >= low - 1e-5).all()
    assert (pixels.max(axis=(0, 2, 3)) <= high + 1e-5).all()
