"""Heads: layers by protocol, files in the released layout, PyTorch's numbers from both."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from dinov2_jax.convert.safetensors_file import read_safetensors
from dinov2_jax.evals.dense.heads import (
    depth_head,
    depth_layers,
    load_head,
    save_head,
    segmentation_head,
)
from dinov2_jax.evals.dense.losses import depth_loss
from dinov2_jax.evals.dense.predict import head_maps, normalise
from dinov2_jax.evals.dense.schedules import HeadSchedule
from dinov2_jax.evals.dense.train_step import Hyper, init_state, train_step
from tests.evals.dense.models import pixels, random_image, tiny
from tests.parity import require
from tests.reference import torch_task_heads

RANGE = (0.001, 10.0)
HEADS = {
    "linear": lambda model: segmentation_head(model, "linear", 6),
    "ms": lambda model: segmentation_head(model, "ms", 6),
    "linear1": lambda model: depth_head(model, "linear1", RANGE),
    "linear4": lambda model: depth_head(model, "linear4", RANGE),
    "dpt": lambda model: small_dpt(depth_head(model, "dpt", RANGE)),
}


def small_dpt(head):
    """The same, of fewer channels."""
    module = head.module.clone(channels=(4, 6, 8, 16), fusion_dim=12, output_dims=(10, 7))
    return dataclasses.replace(head, module=module)


@pytest.mark.parametrize(
    ("depth", "protocol", "expected"),
    [
        (12, "linear1", (11,)),
        (12, "linear4", (2, 5, 8, 11)),
        (24, "dpt", (4, 11, 17, 23)),
        (40, "linear4", (9, 19, 29, 39)),
        (9, "dpt", (1, 3, 6, 8)),
        (1, "linear4", (0, 0, 0, 0)),
    ],
)
def test_layers_of_depth_heads(depth, protocol, expected):
    assert depth_layers(depth, protocol) == expected


@functools.cache
def made(name):
    """A model, a head for it, and random variables, without compiling what would make them."""
    model, rng = tiny(), np.random.default_rng(0)
    head = HEADS[name](model)
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), model.spec.embed_dim))
    return model, head, jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)


@pytest.mark.parametrize("name", HEADS)
def test_what_was_saved_is_loaded_to_the_bit(name, tmp_path):
    model, head, variables = made(name)
    facts = {"depth_range": list(RANGE)} if head.depth_range else {"classes": {"3": "tree"}}
    path = save_head(tmp_path, variables, facts=facts, num_steps=17, pth=False)
    found, loaded, found_facts = load_head(path, model)
    assert found == head
    assert found_facts == facts
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    flat, _ = read_safetensors(path)
    assert all(key.startswith("decode_head.") for key in flat)
    if head.depth_range is None:
        assert flat["decode_head.bn.num_batches_tracked"] == 17


def torch_head(torch, name: str, width: int):
    if name in ("linear", "ms"):
        return torch_task_heads.segmentation(torch, width * (1 if name == "linear" else 4), 6)
    if name == "dpt":
        return torch_task_heads.dpt(torch, width, (4, 6, 8, 16), 12, (10, 7), RANGE[0])
    return torch_task_heads.linear_depth(torch, 2 * width * int(name[-1]), 256, RANGE)


@pytest.mark.parity
@pytest.mark.parametrize("name", HEADS)
def test_a_released_file_on_images_gives_pytorchs_maps(name, tmp_path):
    """Of an uneven image: padded around its centre, as the reference's CenterPadding does."""
    torch, model = require("torch"), tiny()
    theirs = torch_head(torch, name, model.spec.embed_dim)
    state = {f"decode_head.{key}": x for key, x in theirs.state_dict().items()}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "head.pth")
    # Wide, so that hardly anything is cut off.
    depth_range = (RANGE[0], 1000.0) if name == "dpt" else RANGE
    head, variables, _ = load_head(tmp_path / "head.pth", model, default_range=depth_range)
    assert head.protocol == name
    images = normalise(np.stack([random_image(18, 23, i) for i in range(2)]), *_normal(model))
    ours = head_maps(model, head, variables, batch_size=2)(images)
    # 18 x 23 px are 5 x 6 patches of 4: one pixel more on each side, none and one.
    padded = np.pad(images, ((0, 0), (1, 1), (0, 1), (0, 0)))
    outputs = model.intermediate_layers(padded, head.layers, norm=name in ("linear", "ms"))
    maps = [
        (
            torch.tensor(np.array(x.patches)).transpose(1, 2).reshape(2, -1, 5, 6),
            torch.tensor(np.array(x.cls)),
        )
        for x in outputs
    ]
    with torch.no_grad():
        expected = theirs(maps)
    if name in ("linear", "ms"):
        expected = expected.permute(0, 2, 3, 1)
    else:
        expected = expected.clamp(*depth_range)
    expected = expected.numpy()
    assert expected.std() > 0.01
    np.testing.assert_allclose(ours, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parity
@pytest.mark.parametrize("name", HEADS)
def test_pytorch_loads_what_was_saved(name, tmp_path):
    torch = require("torch")
    model, _, variables = made(name)
    save_head(tmp_path, variables, facts={}, num_steps=1, pth=True)
    state = torch.load(tmp_path / "head.pth", weights_only=True)["state_dict"]
    width = model.spec.embed_dim
    theirs = torch_head(torch, name, width)
    theirs.load_state_dict({key.removeprefix("decode_head."): x for key, x in state.items()})


def test_errors(tmp_path):
    model = tiny()
    head = segmentation_head(model, "linear", 6)
    variables = head.init(jax.random.key(0), 24)
    path = save_head(tmp_path, variables, facts={}, num_steps=1, pth=False)
    with pytest.raises(ValueError, match=re.escape("takes 24 channels, and the model's tokens")):
        load_head(path, model)
    depth = depth_head(model, "linear1", RANGE)
    variables = depth.init(jax.random.key(0), model.spec.embed_dim)
    path = save_head(tmp_path, variables, facts={}, num_steps=1, pth=False)
    with pytest.raises(ValueError, match="depth_range=None must be given"):
        load_head(path, model)
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_head(tmp_path / "none.safetensors", model)


def test_every_head_learns_in_the_one_step():
    """The DPT head too, which is too large for a test from the command line."""
    model, head, _ = made("dpt")
    variables = head.init(jax.random.key(0), model.spec.embed_dim)
    images = normalise(np.stack([random_image(16, 16, i) for i in range(2)]), *_normal(model))
    outputs = jax.jit(functools.partial(head.embed, model))(model.params, images)
    depth = np.random.default_rng(0).uniform(1, 3, (2, 16, 16)).astype(np.float32)
    schedule = HeadSchedule(
        decay="cosine", peak=3e-3, total_steps=20, warmup_steps=0, warmup_ratio=1.0
    )
    loss = functools.partial(depth_loss, warmup_steps=0)
    state, losses = init_state(variables), []
    for step in range(12):
        state, metrics = train_step(
            state,
            outputs,
            depth,
            Hyper.at(schedule, step),
            module=head.module,
            grid=(4, 4),
            loss=loss,
            weight_decay=0.01,
            clip_norm=35.0,
        )
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert variables["params"]["head_4"]["bias"] == 1  # alive behind the last ReLU


def test_pixels_have_the_mean_patch_beside_every_patch():
    model = pixels()
    head = depth_head(model, "linear4", RANGE)
    (output, *others) = head.embed(model, model.params, np.ones((1, 28, 42, 3), np.float32))
    assert len(others) == 3
    np.testing.assert_allclose(output.cls, output.patches.mean(axis=1), rtol=1e-6)


def _normal(model):
    return model.spec.mean, model.spec.std
