"""Dense heads by protocol: which layers they take, how they are applied, and their files.

A head's file is a state dict in the released layout (`decode_head.*`), as safetensors or `.pth`;
what that layout does not hold (depth range, classes) is in the metadata of ours.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.convert.safetensors_file import open_safetensors, write_safetensors
from dinov2_jax.convert.task_heads import read_task_head, task_head_to_reference
from dinov2_jax.convert.torch_file import write_torch
from dinov2_jax.features.extractor import mean_patch
from dinov2_jax.model import Model
from dinov2_jax.models.task_heads import DPTHead, LinearDepthHead, SegmentationHead
from dinov2_jax.models.vit import BackboneOutput

SEGMENTATION, DEPTH = ("linear", "ms"), ("linear1", "linear4", "dpt")
METADATA = "dinov2_jax_head"


@dataclasses.dataclass(frozen=True)
class DenseHead:
    """A head on some layers of a frozen model.

    Attributes:
      protocol: among `SEGMENTATION` or `DEPTH`.
      module: of `dinov2_jax.models.task_heads`.
      layers: blocks that it takes, counted from 0, first to last; a shallow network's may repeat.
      norm: whether after the final normalisation.
      depth_range: in metres, to which predictions are limited; None: classes are predicted.
    """

    protocol: str
    module: Any
    layers: tuple[int, ...]
    norm: bool
    depth_range: tuple[float, float] | None = None

    def embed(self, model: Model, params: Any, images: jax.Array) -> list[BackboneOutput]:
        """Outputs of `layers`, without registers; a pure function.

        Args:
          model: frozen.
          params: of it.
          images: normalised, `[b, height, width, c]`.
        """
        blocks = tuple(sorted(set(self.layers)))
        outputs = model.apply_layers(params, images, blocks, self.norm)
        of_block = dict(zip(blocks, outputs, strict=True))
        return [
            x.replace(cls=context(x.cls, mean_patch(x.patches)), registers=x.registers[:, :0])
            for x in map(of_block.get, self.layers)
        ]

    def apply(
        self, variables: Any, outputs: Sequence[BackboneOutput], grid: tuple[int, int]
    ) -> jax.Array:
        """Logits `[b, h, w, classes]`, or metres `[b, h, w]` within the range."""
        maps = self.module.apply(variables, outputs, grid)
        return maps if self.depth_range is None else jnp.clip(maps, *self.depth_range)

    def init(self, key: jax.Array, width: int) -> Any:
        """Random variables for tokens of a width."""
        outputs = [
            BackboneOutput(
                cls=jnp.zeros((1, width)),
                registers=jnp.zeros((1, 0, width)),
                patches=jnp.zeros((1, 4, width)),
            )
        ] * len(self.layers)
        variables = jax.jit(self.module.init, static_argnums=2)(key, outputs, (2, 2))
        if isinstance(self.module, DPTHead):
            # Its last ReLU would start at 0, and could stay there without a slope: 1 m is alive.
            last = variables["params"]["head_4"]
            last["bias"] = jnp.ones_like(last["bias"])
        return variables


def context(cls: jax.Array, mean: jax.Array) -> jax.Array:
    """What stands beside every patch: CLS `[b, d]`, or the mean patch where CLS has another width.

    Pixels as a model have such a CLS.
    """
    return cls if cls.shape == mean.shape else mean


def segmentation_head(model: Model, protocol: str, num_classes: int) -> DenseHead:
    """The last layer ("linear"), or the last four ("ms")."""
    count = min(1 if protocol == "linear" else 4, model.spec.depth)
    layers = tuple(range(model.spec.depth - count, model.spec.depth))
    return DenseHead(protocol, SegmentationHead(num_classes), layers, norm=True)


def depth_head(model: Model, protocol: str, depth_range: tuple[float, float]) -> DenseHead:
    """The last layer ("linear1"), or four over the whole depth ("linear4", "dpt")."""
    width = model.spec.embed_dim
    if protocol == "dpt":
        channels = tuple(max(width // part, 1) for part in (8, 4, 2, 1))
        module = DPTHead(min_depth=depth_range[0], channels=channels)
    else:
        module = LinearDepthHead(*depth_range)
    return DenseHead(protocol, module, depth_layers(model.spec.depth, protocol), False, depth_range)


def depth_layers(depth: int, protocol: str) -> tuple[int, ...]:
    """Blocks of a depth head: the last, or the paper's four, counted from 0."""
    if protocol == "linear1":
        return (depth - 1,)
    if depth == 24:
        return (4, 11, 17, 23)  # the reference's for ViT-L; thirds of it would be 5, 11, 17, 23
    return tuple(max(round(depth * part / 4), 1) - 1 for part in (1, 2, 3, 4))


def load_head(
    path: pathlib.Path,
    model: Model,
    *,
    allowed: Sequence[str] = (*SEGMENTATION, *DEPTH),
    depth_range: tuple[float, float] | None = None,
    default_range: tuple[float, float] | None = None,
) -> tuple[DenseHead, Any, dict[str, Any]]:
    """Reads a head for a model: `(head, variables, facts of its metadata)`.

    Args:
      path: released, or of `save_head`.
      model: whose tokens it takes.
      allowed: protocols that it may be for.
      depth_range: of a depth head, in metres; None: what its metadata says.
      default_range: where they do not say, as released files; None: there must be no need for it.

    Raises:
      FileNotFoundError, ValueError: see `read_task_head`; or its width is not the model's, or it is
        for another protocol.
    """
    head, variables, facts = _read_head(path, model, depth_range, default_range)
    if head.protocol not in allowed:
        raise ValueError(
            f"{path} is a head for {head.protocol}, and not for {' or '.join(allowed)}; give "
            "another, or leave --protocol out"
        )
    return head, variables, facts


def _read_head(
    path: pathlib.Path,
    model: Model,
    depth_range: tuple[float, float] | None,
    default_range: tuple[float, float] | None,
) -> tuple[DenseHead, Any, dict[str, Any]]:
    facts = {}
    if path.suffix == ".safetensors" and path.exists():
        facts = json.loads(open_safetensors(path)[1].get(METADATA, "{}"))
    if depth_range is None:
        depth_range = tuple(facts["depth_range"]) if "depth_range" in facts else default_range
    module, variables = read_task_head(path, depth_range=depth_range)
    width, params = model.spec.embed_dim, variables["params"]
    if isinstance(module, SegmentationHead):
        counts = (1, min(4, model.spec.depth))
        count = _layers_of(path, params["conv_seg"]["kernel"].shape[0], width, counts)
        protocol = "linear" if count == 1 else "ms"
        return segmentation_head(model, protocol, module.num_classes), variables, facts
    if isinstance(module, LinearDepthHead):
        count = _layers_of(path, params["conv_depth"]["kernel"].shape[0], 2 * width, (1, 4))
        protocol = f"linear{count}"
    elif isinstance(module, DPTHead):
        _layers_of(path, params["readout_projects_0"]["kernel"].shape[0], 2 * width, (1,))
        protocol = "dpt"
    else:
        raise ValueError(f"{path} is a classifier, and must be a segmentation or depth head")
    layers = depth_layers(model.spec.depth, protocol)
    return DenseHead(protocol, module, layers, False, depth_range), variables, facts


def save_head(
    folder: pathlib.Path, variables: Any, *, facts: Mapping[str, Any], num_steps: int, pth: bool
) -> pathlib.Path:
    """Writes `head.safetensors` in the released layout, and `head.pth` where that is asked for.

    Args:
      folder: exists.
      variables: of the head's module.
      facts: JSON, for the metadata.
      num_steps: updates that made it; batch normalisation counts them.
      pth: also the released file's form, by PyTorch.
    """
    flat = task_head_to_reference(jax.tree.map(np.asarray, variables), num_steps=num_steps)
    path = folder / "head.safetensors"
    metadata = {METADATA: json.dumps(dict(facts))}
    write_safetensors(path, flat, metadata)
    if pth:
        write_torch(folder / "head.pth", flat, metadata, key="state_dict")
    return path


def _layers_of(path: pathlib.Path, size: int, width: int, allowed: Sequence[int]) -> int:
    """How many layers of a width a head takes."""
    if size not in [width * count for count in allowed]:
        raise ValueError(
            f"{path} takes {size} channels, and the model's tokens give {width} of each layer; "
            "give the head of this model"
        )
    return size // width
