"""Layer normalisation of tokens: flax's, a form for CPUs, or a Pallas kernel for TPU.

Statistics are float32 whatever the compute type; the variance is that of the centred values,
because high-norm tokens make E[x^2] - E[x]^2 cancel.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dinov2_jax.models.drop_path_pallas import fork
from dinov2_jax.models.layer_norm_pallas import EPSILON, normalize

FORMS = ("xla", "products", "pallas")

LayerNorm = functools.partial(nn.LayerNorm, epsilon=EPSILON, use_fast_variance=False)


def choose_layer_norm(form: str, platform: str) -> str:
    """The form that "auto" means on devices of a platform such as "tpu"; others are checked.

    Raises:
      ValueError: a form for another platform.
    """
    own = {"cpu": "products", "tpu": "pallas"}
    if form == "auto":
        return own.get(platform, "xla")
    if form != "xla" and form != own.get(platform):
        wanted = {"products": "CPUs", "pallas": "a TPU"}[form]
        raise ValueError(f"layer_norm={form!r} needs {wanted}, not {platform}; use 'auto' or 'xla'")
    return form


def make_layer_norm(form: str, **settings) -> nn.Module:
    """A `LayerNorm` of one of `FORMS`; all have the same parameters."""
    if form not in FORMS:
        raise ValueError(f"layer_norm={form!r} must be one of {FORMS}; choose one of them")
    forms = {"xla": LayerNorm, "products": ProductLayerNorm, "pallas": KernelLayerNorm}
    return forms[form](**settings)


class ProductLayerNorm(nn.Module):
    """Flax's LayerNorm over the last axis of `[b, n, d]`, its sums over a row as products.

    XLA on CPU does not vectorise a sum over the last axis.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, n, d]` to the same shape in the compute type."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        rows = rearrange(x.astype(jnp.float32), "b n d -> (b n) d")
        return _normalize_rows(rows, scale, bias).reshape(x.shape).astype(self.dtype)


@jax.custom_vjp
def _normalize_rows(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _normalize_rows_forward(x, scale, bias)[0]


def _normalize_rows_forward(x, scale, bias):
    mean = _row_means(x)
    inverse = jax.lax.rsqrt(_row_means((x - mean) ** 2) + EPSILON)
    return (x - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _normalize_rows_backward(residuals, grad):
    x, mean, inverse, scale = residuals
    unit, scaled = (x - mean) * inverse, grad * scale
    x_grad = inverse * (scaled - _row_means(scaled) - unit * _row_means(scaled * unit))
    return x_grad, jnp.sum(grad * unit, axis=0), jnp.sum(grad, axis=0)


# By hand: the means are kept as products are, and not made again.
_normalize_rows.defvjp(_normalize_rows_forward, _normalize_rows_backward)


def _row_means(x: jax.Array) -> jax.Array:
    """`[rows, d]` to `[rows, 1]`."""
    return x @ jnp.full((x.shape[-1], 1), 1 / x.shape[-1])


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
