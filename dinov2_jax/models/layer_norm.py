"""Layer normalisation of tokens: flax's, or a Pallas kernel for TPU that reads them once.

Statistics are float32 whatever the compute type; the variance is that of the centred values,
because high-norm tokens make E[x^2] - E[x]^2 cancel.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinov2_jax.models.drop_path_pallas import fork
from dinov2_jax.models.layer_norm_pallas import EPSILON, normalize

FORMS = ("xla", "pallas")

LayerNorm = functools.partial(nn.LayerNorm, epsilon=EPSILON, use_fast_variance=False)


def choose_layer_norm(form: str, platform: str) -> str:
    """The form that "auto" means on devices of a platform such as "tpu"; others are checked.

    Raises:
      ValueError: the kernel for another platform than a TPU.
    """
    if form == "auto":
        return "pallas" if platform == "tpu" else "xla"
    if form == "pallas" and platform != "tpu":
        raise ValueError(f"layer_norm='pallas' needs a TPU, not {platform}; use 'auto' or 'xla'")
    return form


def make_layer_norm(form: str, **settings) -> nn.Module:
    """A `LayerNorm` of one of `FORMS`; both have the same parameters."""
    if form not in FORMS:
        raise ValueError(f"layer_norm={form!r} must be one of {FORMS}; choose one of them")
    return {"xla": LayerNorm, "pallas": KernelLayerNorm}[form](**settings)


class KernelLayerNorm(nn.Module):
    """Flax's LayerNorm over the last axis of `[b, n, d]`, by the kernel."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, order: jax.Array | None = None, kept: int = 0):
        """Maps `[b, n, d]` to the same shape in the compute type.

        With an `order` of the images, to what `drop_path_pallas.fork` makes of them.
        """
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))[None]
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))[None]
        dtype = jnp.dtype(self.dtype)
        if order is None:
            return normalize(x, scale, bias, dtype)
        return fork(x, scale, bias, order, kept, dtype)
