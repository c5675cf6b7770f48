"""Multi-head self-attention over all tokens of each image.

In: tokens `[b, n, d]`. Out: the same shape. Softmax in float32 whatever the compute type.
Behaviour follows dinov2/layers/attention.py (Apache-2.0): one projection makes queries, keys and
values, in this order, each head-major.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from dinov2_jax.models import attention_pallas
from dinov2_jax.models.layers import TokenDense

IMPLEMENTATIONS = ("xla", "by_head", "cudnn")


def default_implementation() -> str:
    """Of a frozen model, on any devices: "by_head" on one CPU device, else "xla".

    Several devices cut the batch, which a loop over images and heads would gather again. Training
    has many small crops, where the loop gains nothing.
    """
    return "by_head" if jax.default_backend() == "cpu" and jax.device_count() == 1 else "xla"


def choose_implementation(name: str, device: jax.Device, dtype: jnp.dtype) -> str:
    """The implementation that "auto" means on a kind of device; any other name is checked.

    Pallas on TPU; cuDNN on NVIDIA GPUs from Hopper on, in bfloat16 (on the generation before it
    is slower than XLA); XLA elsewhere.

    Args:
      name: "auto", "xla", "pallas" or "cudnn".
      device: one of those that will run it, which need not be of this machine.
      dtype: compute type of the network.

    Raises:
      ValueError: `device` or `dtype` has no such implementation.
    """
    platform = device.platform
    is_gpu, is_bfloat16 = platform in ("gpu", "cuda"), jnp.dtype(dtype) == jnp.bfloat16
    if name == "auto":
        if platform == "tpu":
            return "pallas"
        is_hopper = is_gpu and float(getattr(device, "compute_capability", 0)) >= 9
        return "cudnn" if is_hopper and is_bfloat16 else "xla"
    if name == "cudnn" and not (is_gpu and is_bfloat16):
        raise ValueError(
            f"attention='cudnn' needs a GPU and bfloat16, not {platform} and {jnp.dtype(dtype)}; "
            "use 'auto' or 'xla'"
        )
    if name == "pallas" and platform != "tpu":
        raise ValueError(f"attention='pallas' needs a TPU, not {platform}; use 'auto' or 'xla'")
    return name


class Attention(nn.Module):
    """Self-attention.

    Attributes:
      num_heads: heads; must divide the embedding width.
      implementation: "pallas" (fused; TPU only; where it does not fit, XLA takes over), or see
        `attend`.
      dtype: of the matrix products.
    """

    num_heads: int
    implementation: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens `[b, n, d]` to `[b, n, d]`; every token attends to every other."""
        d = x.shape[-1]
        if d % self.num_heads:
            raise ValueError(
                f"embed_dim={d} must be a multiple of num_heads={self.num_heads}; "
                "the released models have heads of width 64"
            )
        wants_kernel, itemsize = self.implementation == "pallas", jnp.dtype(self.dtype).itemsize
        is_fused = wants_kernel and attention_pallas.fits(*x.shape[1:], self.num_heads, itemsize)
        qkv = TokenDense(3 * d, dtype=self.dtype, hands_out_bias=is_fused, name="qkv")(x)
        if is_fused:
            x = attention_pallas.self_attention(*qkv, num_heads=self.num_heads)
        else:
            q, k, v = split_heads(qkv, self.num_heads)
            x = attend(q, k, v, implementation="xla" if wants_kernel else self.implementation)
            x = rearrange(x, "b heads n hd -> b n (heads hd)")
        x = checkpoint_name(x, "attention")
        return TokenDense(d, dtype=self.dtype, name="proj")(x)


def split_heads(qkv: jax.Array, num_heads: int) -> jax.Array:
    """Queries, keys and values `[3, b, heads, n, hd]` of one projection `[b, n, 3 * d]`."""
    return rearrange(qkv, "b n (three heads hd) -> three b heads n hd", three=3, heads=num_heads)


def attention_probs(q: jax.Array, k: jax.Array) -> jax.Array:
    """How much each query attends to each key: softmax(q kT / sqrt(hd)), float32.

    Args:
      q: queries `[.., n, hd]`.
      k: keys `[.., m, hd]`.

    Returns:
      `[.., n, m]`; sums over m are 1.
    """
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits, axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str = "xla") -> jax.Array:
    """Scaled dot-product attention: softmax(q kT / sqrt(hd)) v.

    Args:
      q: queries `[b, heads, n, hd]`.
      k: keys, same shape.
      v: values, same shape.
      implementation: "xla" (all at once), "by_head" (one head of one image after the other: its
        n x n matrix stays in a CPU's cache, and the backward pass makes it again) or "cudnn"
        (fused; NVIDIA GPU and bfloat16 only).

    Returns:
      `[b, heads, n, hd]` in the type of `v`.

    Raises:
      ValueError: an unknown implementation, or float32 for cuDNN, which has no such kernel.
    """
    if implementation == "xla":
        return _weigh(q, k, v)
    if implementation == "by_head":
        b = q.shape[0]
        # Without batch axes: XLA's batched products take twice the time on a CPU.
        qkv = tuple(rearrange(a, "b heads n hd -> (b heads) n hd") for a in (q, k, v))
        x = jax.lax.map(jax.checkpoint(lambda head: _weigh(*head)), qkv)
        return rearrange(x, "(b heads) n hd -> b heads n hd", b=b)
    if implementation == "cudnn":
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"attention={implementation!r} must have half-precision inputs, not {q.dtype}; "
                "set dtype to bfloat16 or attention to 'xla'"
            )
        q, k, v = (rearrange(a, "b heads n hd -> b n heads hd") for a in (q, k, v))
        x = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        return rearrange(x, "b n heads hd -> b heads n hd")
    raise ValueError(f"attention={implementation!r} must be one of {IMPLEMENTATIONS}; choose one")


def _weigh(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("...nm,...md->...nd", attention_probs(q, k).astype(v.dtype), v)
