"""The projection head of both the DINO and the iBOT loss.

In: features of the backbone. Out: one logit per prototype, float32.
Behaviour follows dinov2/layers/dino_head.py (Apache-2.0).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinov2_jax.models.layers import gelu, kernel_init, torch_uniform_init
from dinov2_jax.sharding import shard_rows


class DINOHead(nn.Module):
    """MLP, L2 normalisation, then cosine similarity with prototypes of learned length.

    Attributes:
      num_prototypes: logits `k`.
      hidden_dim: width of the MLP's hidden layers.
      bottleneck_dim: width of its output, on whose sphere features and prototypes are compared.
      num_layers: linear layers of the MLP, at least 1.
      dtype: of the matrix products; normalisations and logits are float32.
    """

    num_prototypes: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features `[..., d]` to logits `[..., k]`, float32."""
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers} must be at least 1; the default is 3")
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=kernel_init)
        with jax.named_scope("head"):
            features = shard_rows(features)
            if self.num_layers == 1:
                x = dense(self.bottleneck_dim, name="mlp")(features)
            else:
                widths = [self.hidden_dim] * (self.num_layers - 1) + [self.bottleneck_dim]
                x = _Mlp(tuple(widths), dense, name="mlp")(features)
            x = shard_rows(l2_normalize(shard_rows(x).astype(jnp.float32)))
            prototypes = WeightNormDense(self.num_prototypes, dtype=self.dtype, name="last_layer")
            return shard_rows(prototypes(x), last="model")


class _Mlp(nn.Module):
    """Linear layers with GELU between; numbered as PyTorch does, which counts the GELUs."""

    widths: tuple[int, ...]
    dense: Callable[..., nn.Dense]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, width in enumerate(self.widths):
            x = shard_rows(self.dense(width, name=f"{2 * i}")(x if i == 0 else gelu(x)))
        return x


class WeightNormDense(nn.Module):
    """Linear layer without bias, its rows `weight_g * weight_v / |weight_v|`.

    Both are trained: the reference does not freeze `weight_g`, which starts at 1.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., bottleneck]` to float32 `[..., k]`."""
        shape = (self.features, x.shape[-1])
        weight_v = self.param("weight_v", torch_uniform_init(x.shape[-1]), shape)
        weight_g = self.param("weight_g", nn.initializers.ones, (self.features, 1))
        norm = jnp.sqrt(jnp.sum(weight_v**2, axis=-1, keepdims=True))
        weight = weight_v * (weight_g / norm)  # [k, bottleneck]
        return jnp.einsum(
            "...d,kd->...k",
            x.astype(self.dtype),
            weight.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )


def l2_normalize(x: jax.Array, *, eps: float = 1e-12) -> jax.Array:
    """`x / max(|x|, eps)` over the last axis; value and gradient are finite at 0."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), eps**2))
