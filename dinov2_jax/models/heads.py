"""The projection head of both the DINO and the iBOT loss.

In: features of the backbone. Out: one logit per prototype, float32.
Behaviour follows dinov2/layers/dino_head.py (Apache-2.0).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinov2_jax.models.layers import gelu, kernel_init, torch_uniform_init
from dinov2_jax.sharding import shard_prototypes, shard_rows


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

    def setup(self):
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers} must be at least 1; the default is 3")
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=kernel_init)
        if self.num_layers == 1:
            self.mlp = dense(self.bottleneck_dim)
        else:
            widths = [self.hidden_dim] * (self.num_layers - 1) + [self.bottleneck_dim]
            self.mlp = _Mlp(tuple(widths), dense)
        self.last_layer = WeightNormDense(self.num_prototypes, dtype=self.dtype)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features `[..., d]` to logits `[..., k]`, float32."""
        bottleneck = self.bottleneck(features)
        with jax.named_scope("prototypes"):
            return shard_rows(self.last_layer(bottleneck), last="model")

    def bottleneck(self, features: jax.Array) -> jax.Array:
        """Maps features `[..., d]` to unit vectors `[..., bottleneck]`, float32."""
        with jax.named_scope("head"):
            x = shard_rows(self.mlp(shard_rows(features)))
            return shard_rows(l2_normalize(x.astype(jnp.float32)))


class Head(NamedTuple):
    """A head with its parameters, the student's or the teacher's."""

    module: DINOHead
    params: dict[str, Any]

    @property
    def num_prototypes(self) -> int:
        return self.module.num_prototypes

    def logits(self, features: jax.Array) -> jax.Array:
        """`[..., d]` to float32 `[..., k]`."""
        return self.module.apply({"params": self.params}, features)

    def prototypes(self) -> jax.Array:
        """`[k, bottleneck]`: logits are products in its dtype with `bottleneck(features)`."""
        last_layer = self.params["last_layer"]
        weight = weight_norm(last_layer["weight_v"], last_layer["weight_g"])
        return shard_prototypes(weight.astype(self.module.dtype))

    def bottleneck(self, features: jax.Array) -> jax.Array:
        """`[..., d]` to float32 unit vectors `[..., bottleneck]`."""
        return self.module.apply({"params": self.params}, features, method="bottleneck")


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
        return cosine_logits(x, weight_v, weight_g, dtype=self.dtype)


def weight_norm(weight_v: jax.Array, weight_g: jax.Array) -> jax.Array:
    """Directions `[k, d]` of any length and lengths `[k, 1]` to vectors `[k, d]`."""
    return weight_v * (weight_g / row_norms(weight_v))


def row_norms(weight_v: jax.Array) -> jax.Array:
    """Euclidean norms of the rows of `[k, d]`: `[k, 1]`."""
    return jnp.sqrt(jnp.sum(weight_v**2, axis=-1, keepdims=True))


def cosine_logits(
    x: jax.Array, weight_v: jax.Array, weight_g: jax.Array, *, dtype: jnp.dtype
) -> jax.Array:
    """Products of `x [..., d]` with the prototypes, in `dtype`, summed to float32 `[..., k]`."""
    return jnp.einsum(
        "...d,kd->...k",
        x.astype(dtype),
        shard_prototypes(weight_norm(weight_v, weight_g).astype(dtype)),
        preferred_element_type=jnp.float32,
    )


def l2_normalize(x: jax.Array, *, eps: float = 1e-12) -> jax.Array:
    """`x / max(|x|, eps)` over the last axis; value and gradient are finite at 0."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), eps**2))
