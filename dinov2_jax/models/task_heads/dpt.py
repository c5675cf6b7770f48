"""The DPT depth head: four layers become a pyramid, fused from coarse to fine.

Behaviour follows dinov2/hub/depth/decode_heads.py (Apache-2.0), after Ranftl et al., 2021,
arXiv:2103.13413. Convolutions are NHWC and carry the released names, numbers behind underscores.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dinov2_jax.models.layers import gelu
from dinov2_jax.models.task_heads.resize import resize_bilinear
from dinov2_jax.models.vit import BackboneOutput


def conv(features: int, side: int, name: str, *, bias: bool = True, stride: int = 1) -> nn.Conv:
    """A convolution padded as PyTorch's with `padding=side // 2`."""
    return nn.Conv(
        features, (side, side), stride, padding=side // 2, use_bias=bias, name=name
    )  # fmt: skip


class DPTHead(nn.Module):
    """Dense prediction from four layers.

    Attributes:
      min_depth: added to the prediction, in metres.
      channels: of the four levels, finest first. Released: width / 8, / 4, / 2, and the width.
      fusion_dim: channels of the fusion.
      output_dims: channels of the last layers.
    """

    min_depth: float
    channels: tuple[int, int, int, int]
    fusion_dim: int = 256
    output_dims: tuple[int, int] = (128, 32)

    @nn.compact
    def __call__(self, outputs: Sequence[BackboneOutput], grid: tuple[int, int]) -> jax.Array:
        """Maps the outputs of four layers to depth.

        Args:
          outputs: before the final normalisation, first layer to last.
          grid: rows `h` and columns `w` of patches.

        Returns:
          `[b, 16 h, 16 w]`, in metres, at least `min_depth`; an odd side counts as one more, for
          the coarsest level has half the patches, rounded up.
        """
        if len(outputs) != 4:
            raise ValueError(f"{len(outputs)=} must be 4; give the outputs of four layers")
        levels = [self.reassemble(i, output, grid) for i, output in enumerate(outputs)]
        levels = [
            conv(self.fusion_dim, 3, f"convs_{i}", bias=False)(level)
            for i, level in enumerate(levels)
        ]
        x = FusionBlock(name="fusion_blocks_0")(levels[3])
        for i in (1, 2, 3):
            x = FusionBlock(name=f"fusion_blocks_{i}")(x, levels[3 - i])
        x = nn.relu(conv(self.fusion_dim, 3, "project")(x))
        x = conv(self.output_dims[0], 3, "head_0")(x)
        x = _double(x)
        x = nn.relu(conv(self.output_dims[1], 3, "head_2")(x))
        x = conv(1, 1, "head_4")(x)
        return nn.relu(x[..., 0]) + self.min_depth

    def reassemble(self, i: int, output: BackboneOutput, grid: tuple[int, int]) -> jax.Array:
        """Level i of the pyramid: 4 and 2 times as fine as the patches, as fine, half as fine."""
        cls = jnp.broadcast_to(output.cls[:, None], output.patches.shape)
        x = jnp.concatenate([output.patches, cls], axis=-1)
        x = gelu(nn.Dense(output.cls.shape[-1], name=f"readout_projects_{i}")(x))
        x = rearrange(x, "b (h w) d -> b h w d", h=grid[0], w=grid[1])
        x = conv(self.channels[i], 1, f"projects_{i}")(x)
        if i < 2:
            return Enlarge(factor=(4, 2)[i], name=f"resize_layers_{i}")(x)
        return x if i == 2 else conv(self.channels[3], 3, "resize_layers_3", stride=2)(x)


class Enlarge(nn.Module):
    """A transposed convolution whose stride is its size: each pixel becomes a tile."""

    factor: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, h, w, c]` to `[b, factor * h, factor * w, c]`."""
        c, k = x.shape[-1], self.factor
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (c, k, k, c))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        x = jnp.einsum("bhwc,cpqo->bhpwqo", x, kernel)
        return rearrange(x, "b h p w q o -> b (h p) (w q) o") + bias


class FusionBlock(nn.Module):
    """Adds a finer level, refines, and doubles the resolution."""

    @nn.compact
    def __call__(self, x: jax.Array, finer: jax.Array | None = None) -> jax.Array:
        """Maps `[b, h, w, c]` to `[b, 2 h, 2 w, c]`; `finer` is another such map."""
        if finer is not None:
            finer = resize_bilinear(finer, x.shape[1:3], align_corners=False)
            x = x + ResidualUnit(name="res_conv_unit1")(finer)
        x = _double(ResidualUnit(name="res_conv_unit2")(x))
        return conv(x.shape[-1], 1, "project")(x)


class ResidualUnit(nn.Module):
    """Two convolutions, each after a ReLU, and the way around them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, h, w, c]` to the same."""
        c = x.shape[-1]
        inner = conv(c, 3, "conv1", bias=False)(nn.relu(x))
        return x + conv(c, 3, "conv2", bias=False)(nn.relu(inner))


def _double(x: jax.Array) -> jax.Array:
    return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)
