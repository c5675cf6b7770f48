"""Released task heads: the layouts load strictly, and give PyTorch's numbers."""

import re

import jax
import numpy as np
import pytest

from dinov2_jax.convert.state_dict import ConversionError
from dinov2_jax.convert.task_heads import read_task_head, task_head_from_reference
from dinov2_jax.models.task_heads import DPTHead, LinearDepthHead, LinearHead, SegmentationHead
from dinov2_jax.models.vit import BackboneOutput
from tests.parity import require
from tests.reference import torch_task_heads

WIDTH = 16
# Relative to the largest entry, in float32: sums in another order. Measured: 1e-6 at most.
TOLERANCE = 1e-5


def make_outputs(count, grid, batch=2):
    """Random outputs of `count` layers."""
    rng = np.random.default_rng(0)
    n = grid[0] * grid[1]
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return [
        BackboneOutput(
            cls=normal(batch, WIDTH),
            registers=normal(batch, 4, WIDTH),
            patches=normal(batch, n, WIDTH),
        )
        for _ in range(count)
    ]


def to_maps(torch, outputs, grid):
    """The same for the oracle: (patches [b, d, h, w], cls [b, d]) of each layer."""
    return [
        (
            torch.tensor(o.patches).transpose(1, 2).reshape(len(o.cls), WIDTH, *grid),
            torch.tensor(o.cls),
        )
        for o in outputs
    ]


def decode_head(module):
    """A released file's names and arrays."""
    return {f"decode_head.{name}": t.numpy() for name, t in module.state_dict().items()}


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error < TOLERANCE, error


@pytest.mark.parametrize("layers", [1, 4])
def test_classifier(layers):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((7, (layers + 1) * WIDTH)).astype(np.float32)
    bias = rng.standard_normal(7).astype(np.float32)
    module, variables = task_head_from_reference({"weight": weight, "bias": bias})
    assert isinstance(module, LinearHead)
    outputs = make_outputs(layers, (2, 3))
    features = [output.cls for output in outputs] + [outputs[-1].patches.mean(axis=1)]
    expected = np.concatenate(features, axis=1) @ weight.T + bias
    np.testing.assert_allclose(module.apply(variables, outputs), expected, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("layers", [1, 4])
def test_segmentation(layers):
    torch, grid = require("torch"), (3, 5)
    theirs = torch_task_heads.segmentation(torch, layers * WIDTH, 6)
    assert "bn.num_batches_tracked" in theirs.state_dict()
    module, variables = task_head_from_reference(decode_head(theirs))
    assert isinstance(module, SegmentationHead)
    outputs = make_outputs(layers, grid)
    logits = theirs(to_maps(torch, outputs, grid)).permute(0, 2, 3, 1)
    assert_close(module.apply(variables, outputs, grid), logits)


@pytest.mark.parity
@pytest.mark.parametrize("layers", [1, 4])
def test_linear_depth(layers):
    torch, grid, depth_range = require("torch"), (3, 5), (0.001, 10.0)
    theirs = torch_task_heads.linear_depth(torch, 2 * layers * WIDTH, 32, depth_range)
    module, variables = task_head_from_reference(decode_head(theirs), depth_range=depth_range)
    assert isinstance(module, LinearDepthHead)
    outputs = make_outputs(layers, grid)
    depth = module.apply(variables, outputs, grid)
    assert depth.shape == (2, 12, 20)
    assert_close(depth, theirs(to_maps(torch, outputs, grid)))


@pytest.mark.parity
@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
def test_dpt(grid, tmp_path):
    torch = require("torch")
    theirs = torch_task_heads.dpt(torch, WIDTH, (4, 6, 8, 16), 12, (10, 7), 0.001)
    # As released: an mmseg checkpoint.
    state = {f"decode_head.{name}": t for name, t in theirs.state_dict().items()}
    torch.save({"meta": {"epoch": 1}, "state_dict": state}, tmp_path / "dpt.pth")
    module, variables = read_task_head(tmp_path / "dpt.pth", depth_range=(0.001, 10))
    assert isinstance(module, DPTHead)
    outputs = make_outputs(4, grid)
    depth = jax.jit(lambda o: module.apply(variables, o, grid))(outputs)
    expected = theirs(to_maps(torch, outputs, grid))
    assert expected.std() > 0.1
    assert_close(depth, expected)


@pytest.mark.parity
def test_everything_that_does_not_fit_is_in_one_error():
    torch = require("torch")
    flat = decode_head(torch_task_heads.dpt(torch, WIDTH, (4, 6, 8, 16), 12, (10, 7), 0.001))
    del flat["decode_head.fusion_blocks.2.res_conv_unit1.conv2.conv.weight"]
    flat["decode_head.fusion_blocks.0.res_conv_unit1.conv1.conv.weight"] = np.zeros((12, 12, 3, 3))
    flat["decode_head.convs.1.conv.weight"] = np.zeros((12, 5, 3, 3))
    flat["backbone.cls_token"] = np.zeros((1, 1, WIDTH))
    with pytest.raises(ConversionError) as caught:
        task_head_from_reference(flat, depth_range=(0, 1))
    assert sorted(caught.value.problems) == [
        "backbone.cls_token has no rule",
        "params/convs_1/kernel has shape (3, 3, 5, 12), the model (3, 3, 6, 12)",
        "params/fusion_blocks_0/res_conv_unit1/conv1/kernel is not in the model",
        "params/fusion_blocks_2/res_conv_unit1/conv2/kernel of the model has no source",
    ]


def test_errors(tmp_path):
    flat = {"decode_head.conv_depth.weight": np.zeros((8, 32, 1, 1), np.float32)}
    with pytest.raises(ValueError, match=r"depth_range=None must be given .* NYU"):
        task_head_from_reference(flat)
    with pytest.raises(ConversionError, match=r"conv_depth\.bias is missing"):
        task_head_from_reference(flat, depth_range=(0, 1))
    flat = {"decode_head.conv_depth.weight": np.zeros((8, 32, 3, 3), np.float32)}
    with pytest.raises(ConversionError, match=re.escape("(8, 32, 3, 3), not outputs inputs 1 1")):
        task_head_from_reference(flat, depth_range=(0, 1))
    with pytest.raises(ValueError, match="backbones are read by read_model"):
        task_head_from_reference({"cls_token": np.zeros((1, 1, 8))})
    with pytest.raises(ConversionError, match="bias has shape"):
        task_head_from_reference({"weight": np.zeros((5, 8)), "bias": np.zeros(4)})
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_task_head(tmp_path / "head.pth")
