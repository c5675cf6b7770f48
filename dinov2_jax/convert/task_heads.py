"""The released task heads into our modules: classifiers, depth and segmentation heads.

In: a released file. Out: the module that it is for, and its variables. Strict like everything
here. Names: dinov2/hub/{classifiers,depthers}.py and mmseg's heads (Apache-2.0).
"""

import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from dinov2_jax.convert.lazy import Arrays
from dinov2_jax.convert.rules import LINEAR, LINEAR_HEAD, Rule
from dinov2_jax.convert.safetensors_file import open_safetensors
from dinov2_jax.convert.state_dict import (
    ConversionError,
    flatten,
    load,
    mismatches,
    module_from_reference,
    module_to_reference,
    nest,
)
from dinov2_jax.convert.torch_file import read_torch

CONV = "outputs inputs p1 p2 -> p1 p2 inputs outputs"
POINTWISE = "outputs inputs 1 1 -> inputs outputs"
TRANSPOSED = "inputs outputs p1 p2 -> inputs p1 p2 outputs"

LINEAR_DEPTH = (
    Rule("conv_depth.weight", "params/conv_depth/kernel", POINTWISE),
    Rule("conv_depth.bias", "params/conv_depth/bias"),
)
SEGMENTATION = (
    Rule("bn.weight", "params/bn/scale"),
    Rule("bn.bias", "params/bn/bias"),
    Rule("bn.running_mean", "batch_stats/bn/mean"),
    Rule("bn.running_var", "batch_stats/bn/var"),
    Rule("conv_seg.weight", "params/conv_seg/kernel", POINTWISE),
    Rule("conv_seg.bias", "params/conv_seg/bias"),
)
# Counts the batches of training; no other use.
COUNTER = "bn.num_batches_tracked"


def _with_bias(reference: str, ours: str, layout: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{reference}.weight", f"params/{ours}/kernel", layout),
        Rule(f"{reference}.bias", f"params/{ours}/bias"),
    )


DPT = (
    *_with_bias("reassemble_blocks.projects.{j}.conv", "projects_{j}", CONV),
    *_with_bias("reassemble_blocks.readout_projects.{j}.0", "readout_projects_{j}", LINEAR),
    *_with_bias("reassemble_blocks.resize_layers.0", "resize_layers_0", TRANSPOSED),
    *_with_bias("reassemble_blocks.resize_layers.1", "resize_layers_1", TRANSPOSED),
    *_with_bias("reassemble_blocks.resize_layers.3", "resize_layers_3", CONV),
    Rule("convs.{j}.conv.weight", "params/convs_{j}/kernel", CONV),
    *_with_bias("fusion_blocks.{j}.project.conv", "fusion_blocks_{j}/project", CONV),
    *(
        Rule(
            f"fusion_blocks.{{j}}.res_conv_unit{unit}.conv{conv}.conv.weight",
            f"params/fusion_blocks_{{j}}/res_conv_unit{unit}/conv{conv}/kernel",
            CONV,
        )
        for unit in (1, 2)
        for conv in (1, 2)
    ),
    *_with_bias("project.conv", "project", CONV),
    *(rule for i in (0, 2, 4) for rule in _with_bias(f"conv_depth.head.{i}", f"head_{i}", CONV)),
)


def read_task_head(
    path: str | os.PathLike, *, depth_range: tuple[float, float] | None = None
) -> tuple[object, dict]:
    """Reads a released task head as `(module, variables)`; see `task_head_from_reference`.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is damaged, is no task head, or does not fit.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give a file that exists")
    is_safetensors = path.suffix == ".safetensors"
    flat, _ = open_safetensors(path) if is_safetensors else read_torch(path)
    return task_head_from_reference(flat, depth_range=depth_range)


def task_head_from_reference(
    flat: Mapping[str, Arrays], *, depth_range: tuple[float, float] | None = None
) -> tuple[object, dict]:
    """Recognises a task head and makes its module and variables.

    Args:
      flat: name -> array, as released: `weight` and `bias` of a classifier, or names that start
        with "decode_head.".
      depth_range: smallest and largest depth in metres, which depth heads need and their files do
        not hold: (0.001, 10) for NYU, (0.001, 80) for KITTI.

    Returns:
      A module of `dinov2_jax.models.task_heads`, and what its `apply` takes.

    Raises:
      ConversionError: lists every name and shape that does not fit.
      ValueError: it is no task head, or a depth head without a range.
    """
    import jax

    named = {name.removeprefix("decode_head."): array for name, array in flat.items()}
    rules, module, arguments = _recognise(named, depth_range)
    if rules is SEGMENTATION:
        named.pop(COUNTER, None)
    problems = []
    paths = module_from_reference(named, rules, "", problems)
    template = flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments)))
    if rules is LINEAR_HEAD:
        paths = {f"params/{path}": array for path, array in paths.items()}
    problems += mismatches(paths, template, unless=set())
    if problems:
        raise ConversionError("cannot read this task head", problems)
    return module, load(nest(paths))


def task_head_to_reference(variables: Mapping, *, num_steps: int = 0) -> dict[str, np.ndarray]:
    """The released names and layouts of a depth or segmentation head, with "decode_head.".

    Args:
      variables: of `LinearDepthHead`, `DPTHead` or `SegmentationHead`.
      num_steps: updates of its training, which PyTorch's batch normalisation counts.

    Raises:
      ConversionError: lists every path and shape that does not fit.
    """
    paths = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
    is_depth = "params/conv_depth/kernel" in paths
    rules = LINEAR_DEPTH if is_depth else SEGMENTATION if "batch_stats" in variables else DPT
    problems = []
    named = module_to_reference(paths, rules, "", problems)
    if problems:
        raise ConversionError("cannot name this task head", problems)
    if rules is SEGMENTATION:
        named[COUNTER] = np.array(num_steps, np.int64)
    return {f"decode_head.{name}": array for name, array in named.items()}


def _recognise(named: Mapping[str, Arrays], depth_range):
    """The rules, the module, and arguments that have its sizes."""
    from dinov2_jax.models import task_heads
    from dinov2_jax.models.vit import BackboneOutput

    def outputs(width: int, count: int = 1):
        token, patches = np.zeros((1, width), np.float32), np.zeros((1, 4, width), np.float32)
        return [BackboneOutput(cls=token, registers=patches[:, :0], patches=patches)] * count

    def size(name: str, axis: int) -> int:
        shape = named[name].shape if name in named else ()
        return shape[axis] if len(shape) > axis else 1

    grid = (2, 2)
    if set(named) <= {"weight", "bias"} and named:
        # [cls.., mean patch] of any number of layers: two parts have the same shapes.
        head = task_heads.LinearHead(size("weight", 0))
        return LINEAR_HEAD, head, (outputs(max(size("weight", 1) // 2, 1)),)
    if "conv_seg.weight" in named:
        head = task_heads.SegmentationHead(size("conv_seg.weight", 0))
        return SEGMENTATION, head, (outputs(size("conv_seg.weight", 1)), grid)
    is_dpt = any(re.match(r"(reassemble_blocks|conv_depth\.head)\.", name) for name in named)
    if not is_dpt and "conv_depth.weight" not in named:
        raise ValueError(
            f"names such as {sorted(named)[:3]} are not those of a released classifier, depth or "
            "segmentation head; backbones are read by read_model"
        )
    if depth_range is None:
        raise ValueError(
            "depth_range=None must be given for a depth head, whose file does not hold it: "
            "(0.001, 10) for NYU, (0.001, 80) for KITTI"
        )
    if not is_dpt:
        head = task_heads.LinearDepthHead(*depth_range, num_bins=size("conv_depth.weight", 0))
        return LINEAR_DEPTH, head, (outputs(max(size("conv_depth.weight", 1) // 2, 1)), grid)
    head = task_heads.DPTHead(
        min_depth=depth_range[0],
        channels=tuple(size(f"reassemble_blocks.projects.{i}.conv.weight", 0) for i in range(4)),
        fusion_dim=size("project.conv.weight", 0),
        output_dims=(size("conv_depth.head.0.weight", 0), size("conv_depth.head.2.weight", 0)),
    )
    width = size("reassemble_blocks.readout_projects.0.0.weight", 0)
    return DPT, head, (outputs(width, 4), grid)
