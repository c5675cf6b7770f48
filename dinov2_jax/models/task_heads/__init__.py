"""Heads on frozen features, as released beside the backbones: classification, depth, segmentation.

Each takes the `BackboneOutput`s of one or several blocks (`intermediate_layers`) and the patch
grid. `dinov2_jax.convert.task_heads` loads the released files into them.
"""

from dinov2_jax.models.task_heads.depth import LinearDepthHead
from dinov2_jax.models.task_heads.dpt import DPTHead
from dinov2_jax.models.task_heads.linear import LinearHead
from dinov2_jax.models.task_heads.segmentation import SegmentationHead

__all__ = ["DPTHead", "LinearDepthHead", "LinearHead", "SegmentationHead"]
