"""The parts of a block: patch embedding, feed-forward networks, LayerScale, normalisation.

In and out: tokens `[b, n, d]`; activations stay cut over the batch, whatever shards the weights.
Behaviour follows dinov2/layers/{patch_embed,mlp,swiglu_ffn,layer_scale}.py (Apache-2.0).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from dinov2_jax.models.spread import product
from dinov2_jax.sharding import platform, row_shards, shard_rows

FFNS = ("mlp", "swiglu")
PRODUCT_FORMS = ("plain", "flat", "transposed")

# PyTorch's truncated normal of the reference cuts at +-2, 100 standard deviations: a plain one.
kernel_init = nn.initializers.normal(0.02)


def torch_uniform_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for convolutions and linear layers: U(-1, 1) / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU: x times the normal distribution function of x, computed in float32."""
    x_f32 = x.astype(jnp.float32)  # in bfloat16 1 + erf cancels for negative x
    return (x_f32 * _normal_cdf(x_f32)).astype(x.dtype)


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    x_f32 = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * x_f32**2) / math.sqrt(2 * math.pi)
    return ((grad.astype(jnp.float32) * (_normal_cdf(x_f32) + x_f32 * density)).astype(x.dtype),)


# By hand, so that only x is kept for the backward pass: a fifth less memory for a block.
gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _apart(x: jax.Array) -> jax.Array:
    """The same array, which TPU's XLA then writes, not computes anew in the products that read it.

    A product of something computed on the way may take twice as long; see docs/kernels.md.
    """
    return _written(x) if platform() == "tpu" else x


_written = jax.custom_vjp(jax.lax.optimization_barrier)
_written.defvjp(lambda x: (_written(x), None), lambda _, grad: (grad,))


@jax.custom_vjp
def cpu_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Rows `[b, d]` times a kernel `[d, f]`, whose gradient is a product of many columns.

    XLA's products of few columns are slow on CPUs: see docs/performance.md. Reverse mode only.
    """
    return x @ kernel


def _cpu_product_backward(inputs, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    d, f = kernel.shape
    # Without the barrier XLA would undo the transposition.
    of_kernel = jax.lax.optimization_barrier(grad.T @ x).T if f < d else x.T @ grad
    return grad @ kernel.T, of_kernel


# Forward not by itself: remat must see the product.
cpu_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _cpu_product_backward)


def choose_product_form(form: str, platform: str, num_devices: int) -> str:
    """The form of the layers' products that "auto" means on such devices; others are checked.

    "plain" multiplies tokens as they lie; "flat" as one axis of rows, which saves XLA on CPU a
    tenth of a block's time, and on TPU would copy them: 257 or 50 rows do not fill its tiles;
    "transposed" is flat, with the kernels' gradients by `cpu_product`, on one CPU device: a kernel
    that a mesh cuts would be gathered for it.

    Raises:
      ValueError: an unknown form, or "transposed" for other devices.
    """
    is_one_cpu = platform == "cpu" and num_devices <= 1
    if form == "auto":
        return "transposed" if is_one_cpu else "flat" if platform == "cpu" else "plain"
    if form not in PRODUCT_FORMS:
        raise ValueError(f"product_form={form!r} must be one of {PRODUCT_FORMS}; choose one")
    if form == "transposed" and not is_one_cpu:
        raise ValueError(
            f"product_form='transposed' needs one CPU device, not {num_devices} of {platform}; "
            "use 'auto' or 'flat'"
        )
    return form


class TokenDense(nn.Module):
    """A linear layer on tokens; kernel N(0, 0.02), bias 0.

    Attributes:
      features: output width.
      dtype: of the product.
      hands_out_bias: whether the bias is a second result, and gets no gradient by the first.
      num_parts: equal parts of the features that are results, and products, of their own.
      product_form: see `choose_product_form`, "auto" for the devices in use.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    hands_out_bias: bool = False
    num_parts: int = 1
    product_form: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array):
        """Maps tokens `[b, n, d]` to `[b, n, features]`, or to a tuple of its parts.

        If the bias is handed out, to a pair of that and the bias, whole.
        """
        d, kernel = x.shape[-1], self.get_variable("params", "kernel")
        if kernel is None or kernel.shape != (row_shards(x) * d, self.features):  # not of `spread`
            kernel = self.param("kernel", kernel_init, (d, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        added = jax.lax.stop_gradient(bias) if self.hands_out_bias else bias
        if self.num_parts > 1:
            parts = (jnp.split(a, self.num_parts, axis=-1) for a in (kernel, added))
            out = tuple(self._map(x, *part) for part in zip(*parts, strict=True))
        else:
            out = self._map(x, kernel, added)
        return (out, bias) if self.hands_out_bias else out

    def _map(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        b, n, d = x.shape
        num_devices = jax.sharding.get_abstract_mesh().size
        form = choose_product_form(self.product_form, platform(), num_devices)
        if form != "plain":
            x = rearrange(x, "b n d -> (b n) d")
        if len(kernel) == d:
            x = (cpu_product if form == "transposed" else jnp.matmul)(x, kernel) + bias
        else:
            x = checkpoint_name(product(x, kernel), "product") + bias
        return shard_rows(x.reshape(b, n, bias.size))


class Projection(nn.Module):
    """The patch embedding's weights, kept in the layout of a convolution.

    Attributes:
      patch_size: side of a patch in pixels.
      features: output width.
      dtype: of the product.
    """

    patch_size: int
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Maps flat patches `[.., p * p * c]` (rows, columns, channels) to `[.., features]`."""
        fan_in = patches.shape[-1]
        shape = (self.patch_size, self.patch_size, fan_in // self.patch_size**2, self.features)
        kernel = self.param("kernel", torch_uniform_init(fan_in), shape)
        bias = self.param("bias", torch_uniform_init(fan_in), (self.features,))
        patches, kernel, bias = nn.dtypes.promote_dtype(patches, kernel, bias, dtype=self.dtype)
        return patches @ rearrange(kernel, "p1 p2 c d -> (p1 p2 c) d") + bias


class PatchEmbed(nn.Module):
    """Cuts images into patches and embeds each: a convolution whose stride is its size.

    As a product of flat patches, which is faster on CPU than the convolution.

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
        return shard_rows(rearrange(tokens, "(b n) d -> b n d", b=b))


class Mlp(nn.Module):
    """Two layers with an exact GELU between."""

    hidden_dim: int
    dtype: jnp.dtype = jnp.float32
    product_form: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, hands_out_bias: bool = False):
        """Maps tokens `[b, n, d]` to `[b, n, d]`; the last bias as in `TokenDense`."""
        layer = functools.partial(TokenDense, dtype=self.dtype, product_form=self.product_form)
        hidden = _apart(gelu(layer(self.hidden_dim, name="fc1")(x)))
        return layer(x.shape[-1], hands_out_bias=hands_out_bias, name="fc2")(hidden)


class SwiGLU(nn.Module):
    """Gated feed-forward network: w3(silu(gate) * value), the gate being the first half of w12."""

    hidden_dim: int
    dtype: jnp.dtype = jnp.float32
    product_form: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, hands_out_bias: bool = False):
        """Maps tokens `[b, n, d]` to `[b, n, d]`; the last bias as in `TokenDense`."""
        d, num_parts = x.shape[-1], 1
        if platform() == "tpu":
            # In one array the halves are not whole tiles, and their gradients are put together in
            # a pass of its own: 8 of the 112 ms of ViT-L's backbone by the compiler's cycles.
            num_parts = 2
        layer = functools.partial(TokenDense, dtype=self.dtype, product_form=self.product_form)
        x = layer(2 * self.hidden_dim, num_parts=num_parts, name="w12")(x)
        gate, value = jnp.split(x, 2, axis=-1) if num_parts == 1 else x
        hidden = _apart(nn.silu(gate) * value)
        return layer(d, hands_out_bias=hands_out_bias, name="w3")(hidden)


def ffn_hidden_dim(embed_dim: int, mlp_ratio: float, ffn: str) -> int:
    """Hidden width: `embed_dim * mlp_ratio`; for SwiGLU two thirds of it, up to a multiple of 8."""
    hidden_dim = int(embed_dim * mlp_ratio)
    if ffn == "mlp":
        return hidden_dim
    if ffn == "swiglu":
        return (int(hidden_dim * 2 / 3) + 7) // 8 * 8
    raise ValueError(f"{ffn=} must be one of {FFNS}; choose one of them")


class LayerScale(nn.Module):
    """Multiplies a residual by a learned vector that starts at `initial_value`, in float32."""

    initial_value: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps a residual `[.., d]` of any type to float32 `[.., d]`."""
        gamma = self.param("gamma", nn.initializers.constant(self.initial_value), (x.shape[-1],))
        return x.astype(jnp.float32) * gamma
