"""Layer normalisation of tokens: flax's, or a Pallas kernel for TPU that reads them once.

Statistics are float32 whatever the compute type; the variance is that of the centred values,
because high-norm tokens make E[x^2] - E[x]^2 cancel. XLA reads the tokens once for the mean, once
for the variance and once for the result, and as often again for the gradient.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dinov2_jax.sharding import on_each_device, platform

FORMS = ("xla", "pallas")
EPSILON = 1e-6
MAX_ROWS = 320  # tokens of a block; more take several blocks of 256
MIB = 2**20

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
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, n, d]` to the same shape in the compute type."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return _normalize(x, scale[None], bias[None], jnp.dtype(self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x, scale, bias, dtype):
    def kernel(x, scale, bias):
        plan = _Plan(x)
        return pl.pallas_call(
            _forward_kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, dtype),
            in_specs=[plan.tokens, plan.vector, plan.vector],
            out_specs=plan.tokens,
            name="layer_norm_forward",
            **plan.settings(num_arrays=2),
        )(x, scale, bias)

    return on_each_device(kernel, x, replicated=(scale, bias))


def _backward(dtype, kept, grad):
    x, scale = kept

    def kernel(x, grad, scale):
        plan = _Plan(x)
        sums = jax.ShapeDtypeStruct((*plan.grid, 1, x.shape[-1]), jnp.float32)
        return pl.pallas_call(
            functools.partial(_backward_kernel, num_rows=x.shape[1]),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums],
            in_specs=[plan.tokens, plan.tokens, plan.vector],
            out_specs=[plan.tokens, plan.sums, plan.sums],
            name="layer_norm_backward",
            **plan.settings(num_arrays=3),
        )(x, grad, scale)

    dx, dscale, dbias = on_each_device(kernel, x, grad, replicated=(scale,))
    return dx, dscale.sum(axis=(0, 1)), dbias.sum(axis=(0, 1))


_normalize.defvjp(
    lambda x, scale, bias, dtype: (_normalize(x, scale, bias, dtype), (x, scale)), _backward
)


class _Plan:
    """Blocks of one image's tokens, all of them or 256 at a time; the last may reach beyond."""

    def __init__(self, x: jax.Array):
        b, n, d = x.shape
        rows = n if n <= MAX_ROWS else 256
        self.grid = (b, pl.cdiv(n, rows))
        self.tokens = pl.BlockSpec((1, rows, d), lambda image, step: (image, step, 0))
        self.vector = pl.BlockSpec((1, d), lambda image, step: (0, 0))
        self.sums = pl.BlockSpec((1, 1, 1, d), lambda image, step: (image, step, 0, 0))
        self._x, self._block = x, rows * d

    def settings(self, num_arrays: int) -> dict:
        """Of a call that reads and writes so many arrays as large as the tokens."""
        vmem = self._block * 4 * (2 * num_arrays + 6)
        return dict(
            grid=self.grid,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=max(16 * MIB, vmem)
            ),
            cost_estimate=pl.CostEstimate(
                flops=8 * self._x.size,
                transcendentals=0,
                bytes_accessed=num_arrays * self._x.nbytes,
            ),
            interpret=platform() != "tpu",
        )


def _statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens without mean and with variance 1, and the factor for it."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + EPSILON)
    return centred * factor, factor


def _forward_kernel(x_ref, scale_ref, bias_ref, out_ref):
    normal, _ = _statistics(x_ref[0])
    out_ref[0] = (normal * scale_ref[...] + bias_ref[...]).astype(out_ref.dtype)


def _backward_kernel(x_ref, grad_ref, scale_ref, dx_ref, dscale_ref, dbias_ref, *, num_rows: int):
    x, grad = x_ref[0], grad_ref[0].astype(jnp.float32)
    if num_rows % x.shape[0]:  # beyond the last token lies anything
        row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + pl.program_id(1) * x.shape[0]
        x = jnp.where(row < num_rows, x.astype(jnp.float32), 0.0)
        grad = jnp.where(row < num_rows, grad, 0.0)
    normal, factor = _statistics(x)
    dscale_ref[0, 0] = (grad * normal).sum(axis=0, keepdims=True)
    dbias_ref[0, 0] = grad.sum(axis=0, keepdims=True)
    grad = grad * scale_ref[...]
    along = (grad * normal).mean(axis=-1, keepdims=True)
    dx = (grad - grad.mean(axis=-1, keepdims=True) - normal * along) * factor
    dx_ref[0] = dx.astype(dx_ref.dtype)
