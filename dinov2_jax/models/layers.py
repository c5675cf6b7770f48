"""The parts of a block: patch embedding, feed-forward networks, LayerScale, normalisation.

Behaviour follows dinov2/layers/{patch_embed,mlp,swiglu_ffn,layer_scale}.py (Apache-2.0).
Dense layers see flat tokens `[(b n), d]`: XLA on CPU runs 2-d products best.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

FFNS = ("mlp", "swiglu")

# PyTorch's truncated normal of the reference cuts at +-2, 100 standard deviations: a plain one.
kernel_init = nn.initializers.normal(0.02)

# Statistics are float32 whatever the compute type; the variance is that of the centred values,
# because high-norm tokens make E[x^2] - E[x]^2 cancel.
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


def torch_uniform_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for convolutions and linear layers: U(-1, 1) / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU: x times the normal distribution function of x."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


class Projection(nn.Module):
    """Kernel and bias of the patch embedding, kept in the layout of a convolution."""

    patch_size: int
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Maps flat patches `[.., p * p * c]` (rows, columns, channels) to `[.., d]`."""
        fan_in = patches.shape[-1]
        channels = fan_in // self.patch_size**2
        shape = (self.patch_size, self.patch_size, channels, self.features)
        init = torch_uniform_init(fan_in)
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", init, (self.features,))
        patches, kernel, bias = nn.dtypes.promote_dtype(patches, kernel, bias, dtype=self.dtype)
        return patches @ rearrange(kernel, "p1 p2 c d -> (p1 p2 c) d") + bias


class PatchEmbed(nn.Module):
    """Cuts images into patches and embeds each: a convolution whose stride is its size.

    Attributes:
      patch_size: side of a patch in pixels.
      embed_dim: width of the embedding.
      dtype: of the matrix product.
    """

    patch_size: int
    embed_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[b, height, width, c]` to patch tokens `[b, n, d]`, row by row."""
        b, height, width, _ = images.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"{height=} and {width=} must be multiples of patch_size={self.patch_size}; crop "
                f"or resize to {height // self.patch_size * self.patch_size} x "
                f"{width // self.patch_size * self.patch_size}"
            )
        p = self.patch_size
        patches = rearrange(images, "b (h p1) (w p2) c -> (b h w) (p1 p2 c)", p1=p, p2=p)
        tokens = Projection(p, self.embed_dim, dtype=self.dtype, name="proj")(patches)
        return rearrange(tokens, "(b n) d -> b n d", b=b)


class Mlp(nn.Module):
    """Two layers with an exact GELU between."""

    hidden_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens `[b, n, d]` to `[b, n, d]`."""
        b, _, d = x.shape
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=kernel_init)
        x = rearrange(x, "b n d -> (b n) d")
        x = gelu(dense(self.hidden_dim, name="fc1")(x))
        x = dense(d, name="fc2")(x)
        return rearrange(x, "(b n) d -> b n d", b=b)


class SwiGLU(nn.Module):
    """Gated feed-forward network: w3(silu(gate) * value), the gate being the first half of w12."""

    hidden_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens `[b, n, d]` to `[b, n, d]`."""
        b, _, d = x.shape
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=kernel_init)
        x = rearrange(x, "b n d -> (b n) d")
        gate, value = jnp.split(dense(2 * self.hidden_dim, name="w12")(x), 2, axis=-1)
        x = dense(d, name="w3")(nn.silu(gate) * value)
        return rearrange(x, "(b n) d -> b n d", b=b)


def ffn_hidden_dim(embed_dim: int, mlp_ratio: float, ffn: str) -> int:
    """Hidden width: `embed_dim * mlp_ratio`; for SwiGLU two thirds of it, up to a multiple of 8."""
    hidden_dim = int(embed_dim * mlp_ratio)
    if ffn == "mlp":
        return hidden_dim
    if ffn == "swiglu":
        return (int(hidden_dim * 2 / 3) + 7) // 8 * 8
    raise ValueError(f"{ffn=} must be one of {FFNS}; choose one of them")


class LayerScale(nn.Module):
    """Multiplies a residual by a learned vector, in float32."""

    init: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps a residual `[.., d]` of any type to float32 `[.., d]`."""
        gamma = self.param("gamma", nn.initializers.constant(self.init), (x.shape[-1],))
        return x.astype(jnp.float32) * gamma
