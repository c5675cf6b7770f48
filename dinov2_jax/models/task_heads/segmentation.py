"""The linear segmentation head: batch normalisation and one product for each patch.

Behaviour follows `BNHead` of dinov2/eval/segmentation/models/decode_heads/linear_head.py
(Apache-2.0), whose released heads take the last layer ("linear") or the last four ("ms").
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dinov2_jax.models.vit import BackboneOutput


class SegmentationHead(nn.Module):
    """Logits of the patch tokens of some layers, side by side."""

    num_classes: int

    @nn.compact
    def __call__(
        self, outputs: Sequence[BackboneOutput], grid: tuple[int, int], *, train: bool = False
    ) -> jax.Array:
        """Maps the outputs of n layers to logits.

        Args:
          outputs: after the final normalisation, first layer to last.
          grid: rows `h` and columns `w` of patches.
          train: whether statistics are the batch's, and "batch_stats" is updated.

        Returns:
          `[b, h, w, num_classes]`; the caller resizes them to the image.
        """
        patches = jnp.concatenate([output.patches for output in outputs], axis=-1)
        x = rearrange(patches, "b (h w) c -> b h w c", h=grid[0], w=grid[1])
        x = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, name="bn"
        )(x)  # fmt: skip
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=init, name="conv_seg")(x)
