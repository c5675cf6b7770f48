"""Floating-point operations of a training step, counted from its sizes.

Matrix products of backbones and heads only, a multiply-add being two: what the matrix units are
for. Sinkhorn, losses, normalisations and augmentation are left out, so is all recomputation.
"""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class BackboneSizes:
    """What a vision transformer's cost depends on.

    Attributes:
      embed_dim, depth, patch_size, in_channels: as in `VisionTransformer`.
      ffn_dim: hidden width; num_ffn_products: 2 of an MLP, 3 of SwiGLU, each of d x ffn_dim.
      num_extra_tokens: class token and registers.
    """

    embed_dim: int
    depth: int
    ffn_dim: int
    num_ffn_products: int
    patch_size: int
    in_channels: int
    num_extra_tokens: int

    def embedding(self, crop_size_px: int) -> float:
        """Of the patch embedding of one crop, forward."""
        patches = (crop_size_px // self.patch_size) ** 2
        return 2 * patches * self.patch_size**2 * self.in_channels * self.embed_dim

    def blocks(self, crop_size_px: int) -> float:
        """Of all blocks for one crop, forward: 2 (4 d^2 + products d f) + 4 t d a token."""
        d = self.embed_dim
        tokens = (crop_size_px // self.patch_size) ** 2 + self.num_extra_tokens
        per_token = 2 * (4 * d * d + self.num_ffn_products * d * self.ffn_dim) + 4 * tokens * d
        return self.depth * tokens * per_token


@dataclasses.dataclass(frozen=True)
class HeadSizes:
    """Of a projection head; see `DINOHead`."""

    in_dim: int
    hidden_dim: int
    bottleneck_dim: int
    num_layers: int
    num_prototypes: int

    def row(self) -> float:
        """Of one row, forward."""
        hidden = [self.hidden_dim] * (self.num_layers - 1)
        widths = [self.in_dim, *hidden, self.bottleneck_dim, self.num_prototypes]
        return 2 * sum(a * b for a, b in itertools.pairwise(widths))


def step_flops(
    *,
    backbone: BackboneSizes,
    images: int,
    global_crop_size_px: int,
    local_crop_size_px: int,
    num_local_crops: int,
    dino_head: HeadSizes | None = None,
    ibot_head: HeadSizes | None = None,
    kept_global: float = 1.0,
    kept_local: float = 1.0,
    ibot_rows: float = 0.0,
    num_global_crops: int = 2,
) -> float:
    """FLOPs of one step over all devices: the student's two passes and the teacher's one.

    A backward pass costs twice its forward pass, but for the patch embedding, whose input needs no
    gradient.

    Args:
      backbone, dino_head, ibot_head: sizes; a head is None where there is no such loss.
      images: in the batch.
      global_crop_size_px, local_crop_size_px, num_local_crops, num_global_crops: the crops.
      kept_global, kept_local: share of the crops that drop path computes a branch for. 1 for the
        *model* FLOPs, which do not depend on what is skipped.
      ibot_rows: rows of the whole batch that go through the head of the patches.
    """
    crops = (
        (num_global_crops, global_crop_size_px, kept_global),
        (num_local_crops, local_crop_size_px, kept_local),
    )
    total = 0.0
    for count, size, kept in crops:
        if count:
            total += (
                images * count * (2 * backbone.embedding(size) + 3 * kept * backbone.blocks(size))
            )
    teacher = backbone.embedding(global_crop_size_px) + backbone.blocks(global_crop_size_px)
    total += images * num_global_crops * teacher
    if dino_head is not None:
        rows = images * (3 * (num_global_crops + num_local_crops) + num_global_crops)
        total += rows * dino_head.row()
    if ibot_head is not None:
        total += 4 * ibot_rows * ibot_head.row()
    return total
