"""Multi-head self-attention over all tokens of each image.

In: tokens `[b, n, d]`. Out: the same shape. Softmax in float32 whatever the compute type.
Behaviour follows dinov2/layers/attention.py (Apache-2.0): one projection makes queries, keys and
values, in this order, each head-major.
"""

import functools
import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from dinov2_jax.models import attention_pallas
from dinov2_jax.models.layers import TokenDense

IMPLEMENTATIONS = ("xla", "by_head", "pallas", "cudnn")
# Heads of fewer tokens are too little work to be computed one after the other.
FEWEST_BY_HEAD = 128


def default_implementation() -> str:
    """Of a frozen model, on any devices: "by_head" on one CPU device, else "xla".

    Several devices cut the batch, which a loop over images and heads would gather again.
    """
    return "by_head" if jax.default_backend() == "cpu" and jax.device_count() == 1 else "xla"


def choose_implementation(name: str, device: jax.Device, dtype: jnp.dtype) -> str:
    """The implementation that "auto" means on a kind of device; any other name is checked.

    Pallas on TPU; cuDNN on NVIDIA GPUs from Hopper on, in bfloat16 (on the generation before it
    is slower than XLA); head by head on one CPU device of one or two cores: more might wait for a
    loop of pieces too small for all of them. XLA elsewhere.

    Args:
      name: "auto", "xla", "by_head", "pallas" or "cudnn".
      device: one of those that will run it, which need not be of this machine (CPUs are).
      dtype: compute type of the network.

    Raises:
      ValueError: `device` or `dtype` has no such implementation, or devices are too many for it.
    """
    platform = device.platform
    is_gpu, is_bfloat16 = platform in ("gpu", "cuda"), jnp.dtype(dtype) == jnp.bfloat16
    if name == "auto":
        if platform == "tpu":
            return "pallas"
        if platform == "cpu":
            return default_implementation() if num_cores() <= 2 else "xla"
        return "cudnn" if is_gpu and is_bfloat16 and _is_hopper(device) else "xla"
    if name == "cudnn" and not (is_gpu and is_bfloat16):
        raise ValueError(
            f"attention='cudnn' needs a GPU and bfloat16, not {platform} and {jnp.dtype(dtype)}; "
            "use 'auto' or 'xla'"
        )
    if name == "pallas" and platform != "tpu":
        raise ValueError(f"attention='pallas' needs a TPU, not {platform}; use 'auto' or 'xla'")
    if name == "by_head" and (platform != "cpu" or jax.device_count() > 1):
        raise ValueError(
            f"attention='by_head' needs one CPU device, not {jax.device_count()} of {platform}, "
            "where its loop is slow; use 'auto' or 'xla'"
        )
    return name


def _is_hopper(device: jax.Device) -> bool:
    """Or later. Capabilities of other makers' GPUs are names, such as gfx942, if there are any."""
    version = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return version is not None and int(version[1]) >= 9


def computed_by(name: str, n: int, d: int, num_heads: int, dtype: jnp.dtype) -> str:
    """What computes attention over n tokens of width d: `name`, or XLA where that is not for them.

    Pallas by whether its kernels fit the chip of the mesh in use, cuDNN by the width of a head,
    "by_head" by `FEWEST_BY_HEAD`.
    """
    if name == "by_head" and n < FEWEST_BY_HEAD:
        return "xla"
    if name == "pallas" and not attention_pallas.fits(n, d, num_heads, jnp.dtype(dtype).itemsize):
        return "xla"
    if name == "cudnn" and not _has_cudnn(d // num_heads):
        return "xla"
    return name


def _has_cudnn(head_width: int) -> bool:
    """Whether cuDNN has kernels for it on this GPU: what jax refuses otherwise, in any length."""
    widest = 256 if _is_hopper(jax.devices()[0]) else 128
    return head_width % 8 == 0 and head_width <= widest


def num_cores() -> int:
    """Of this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Attention(nn.Module):
    """Self-attention.

    Attributes:
      num_heads: heads; must divide the embedding width.
      implementation: "pallas" (fused; TPU only; where it does not fit, XLA takes over), "by_head"
        (`attend_by_head`; of `FEWEST_BY_HEAD` tokens and more), or see `attend`.
      dtype: of the matrix products.
      product_form: of those with weights, see `choose_product_form`.
    """

    num_heads: int
    implementation: str = "xla"
    dtype: jnp.dtype = jnp.float32
    product_form: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, hands_out_bias: bool = False):
        """Maps tokens `[b, n, d]` to `[b, n, d]`; every token attends to every other.

        `hands_out_bias` is of the last layer, as in `TokenDense`.
        """
        d = x.shape[-1]
        if d % self.num_heads:
            raise ValueError(
                f"embed_dim={d} must be a multiple of num_heads={self.num_heads}; "
                "the released models have heads of width 64"
            )
        implementation = computed_by(
            self.implementation, *x.shape[1:], self.num_heads, dtype=self.dtype
        )
        is_fused = implementation == "pallas"
        layer = functools.partial(TokenDense, dtype=self.dtype, product_form=self.product_form)
        qkv = layer(3 * d, hands_out_bias=is_fused, name="qkv")(x)
        if is_fused:
            x = attention_pallas.self_attention(*qkv, num_heads=self.num_heads)
        elif implementation == "by_head":
            x = attend_by_head(qkv, self.num_heads)
        else:
            q, k, v = split_heads(qkv, self.num_heads)
            x = attend(q, k, v, implementation=implementation)
            x = rearrange(x, "b heads n hd -> b n (heads hd)")
        x = checkpoint_name(x, "attention")
        return layer(d, hands_out_bias=hands_out_bias, name="proj")(x)


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
      implementation: "xla" (all at once) or "cudnn" (fused; NVIDIA GPU and bfloat16 only).

    Returns:
      `[b, heads, n, hd]` in the type of `v`.

    Raises:
      ValueError: an unknown implementation, or float32 for cuDNN, which has no such kernel.
    """
    if implementation == "xla":
        return _weigh(q, k, v)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend_by_head(qkv: jax.Array, num_heads: int) -> jax.Array:
    """Attention for one head of one image after the other: its n x n matrix stays in the cache.

    For CPUs. Heads are cut out of the projection and written to their places, so nothing is
    transposed. The backward pass makes the matrix again: only the projection is kept for it.

    Args:
      qkv: queries, keys and values, in this order, each head-major: `[b, n, 3 d]`.
      num_heads: divides d.

    Returns:
      `[b, n, d]` in the type of `qkv`; softmax in float32.
    """
    qkv = rearrange(qkv, "b n (three heads hd) -> b n three heads hd", three=3, heads=num_heads)

    def put_head(i, x):
        return _put_head(x, _weigh(*_take_head(qkv, i))[None], i)

    x = _for_each_head(put_head, jnp.zeros_like(qkv[:, :, :1]))
    return rearrange(x, "b n 1 heads hd -> b n (heads hd)")


def _attend_by_head_backward(num_heads: int, qkv: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    split = functools.partial(rearrange, heads=num_heads)
    qkv = split(qkv, "b n (three heads hd) -> b n three heads hd", three=3)
    grad = split(grad, "b n (heads hd) -> b n 1 heads hd")

    def put_head(i, qkv_grad):
        _, pull = jax.vjp(_weigh, *_take_head(qkv, i))
        return _put_head(qkv_grad, jnp.stack(pull(*_take_head(grad, i))), i)

    x = _for_each_head(put_head, jnp.zeros_like(qkv))
    return (rearrange(x, "b n three heads hd -> b n (three heads hd)"),)


attend_by_head.defvjp(lambda qkv, h: (attend_by_head(qkv, h), qkv), _attend_by_head_backward)


def _for_each_head(put_head, x: jax.Array) -> jax.Array:
    """Fills `[b, n, .., heads, hd]` by `put_head(i, x)`: head `i % heads` of image `i // heads`."""
    return jax.lax.fori_loop(0, x.shape[0] * x.shape[-2], put_head, x)


def _take_head(x: jax.Array, i: jax.Array) -> jax.Array:
    """Of `[b, n, parts, heads, hd]` the parts of one head: `[parts, n, hd]`."""
    _, n, parts, heads, hd = x.shape
    x = jax.lax.dynamic_slice(x, (i // heads, 0, 0, i % heads, 0), (1, n, parts, 1, hd))
    return rearrange(x, "1 n parts 1 hd -> parts n hd")


def _put_head(x: jax.Array, head: jax.Array, i: jax.Array) -> jax.Array:
    """The inverse of `_take_head`."""
    head, heads = rearrange(head, "parts n hd -> 1 n parts 1 hd"), x.shape[-2]
    return jax.lax.dynamic_update_slice(x, head, (i // heads, 0, 0, i % heads, 0))
