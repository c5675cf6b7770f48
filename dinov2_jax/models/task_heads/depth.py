"""The linear depth head: a distribution over depths for each patch, from one product.

Behaviour follows `BNHead` of dinov2/eval/depth/models/decode_heads (Apache-2.0). The released heads
take layers before the final normalisation: the last one, or four.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dinov2_jax.models.task_heads.resize import resize_bilinear
from dinov2_jax.models.vit import BackboneOutput


class LinearDepthHead(nn.Module):
    """Expected depth under a distribution over bins.

    Attributes:
      min_depth, max_depth: of the bins, in metres. Released: (0.001, 10) NYU, (0.001, 80) KITTI.
      num_bins: depths, equally spaced, both ends included.
      upsample: the map is this many times finer than the patch grid.
    """

    min_depth: float
    max_depth: float
    num_bins: int = 256
    upsample: int = 4

    @nn.compact
    def __call__(self, outputs: Sequence[BackboneOutput], grid: tuple[int, int]) -> jax.Array:
        """Maps the outputs of n layers to depth.

        Args:
          outputs: before the final normalisation, first layer to last.
          grid: rows `h` and columns `w` of patches.

        Returns:
          `[b, upsample * h, upsample * w]`, in metres, between the two ends.
        """
        features = jnp.concatenate(
            [part for output in outputs for part in (output.patches, _spread(output))], axis=-1
        )
        # The reference resizes before its product; both are linear, and bins are fewer.
        logits = nn.Dense(self.num_bins, name="conv_depth")(features)
        logits = rearrange(logits, "b (h w) k -> b h w k", h=grid[0], w=grid[1])
        size = (self.upsample * grid[0], self.upsample * grid[1])
        logits = resize_bilinear(logits, size, align_corners=False)
        weights = nn.relu(logits) + 0.1
        bins = jnp.linspace(self.min_depth, self.max_depth, self.num_bins)
        depth = jnp.sum(weights * bins, axis=-1) / jnp.sum(weights, axis=-1)
        return jnp.clip(depth, self.min_depth, self.max_depth)


def _spread(output: BackboneOutput) -> jax.Array:
    """The class token beside every patch, `[b, n, d]`."""
    return jnp.broadcast_to(output.cls[:, None], output.patches.shape)
