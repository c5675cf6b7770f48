"""Cross-entropy against soft targets, with a backward pass that stores no [n, k] of its own.

Logits and targets in, one float32 number per row out. Behaviour follows the sum of
target * log_softmax in dinov2/loss/dino_clstoken_loss.py and ibot_patch_loss.py (Apache-2.0).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


@jax.custom_vjp
def cross_entropy(logits: Array, targets: Array, temp: ArrayLike) -> Array:
    """-sum_k targets * log_softmax(logits / temp), row by row.

    With z = logits / temp, less the row's maximum, it is sum(targets) * log(sum(exp(z))) -
    <targets, z>: reductions only. The backward pass, which automatic differentiation would feed
    from stored [n, k] arrays, computes (sum(targets) * softmax(z) - targets) / temp from the
    logits again: half the temporary memory, in the same time.

    Args:
      logits: student logits `[..., k]`; any float type, computed in float32.
      targets: `[..., k]`, >= 0, broadcast against logits; rows may sum to any number. Constants:
        they receive no gradient, and neither does temp.
      temp: student temperature, > 0.

    Returns:
      `[...]`, float32.
    """
    return _forward(logits, targets, temp)[0]


def _forward(logits, targets, temp):
    z = logits.astype(jnp.float32) / temp
    row_max = z.max(axis=-1, keepdims=True)
    z = z - row_max  # here and in the backward pass: exact near the maximum, at any logits
    log_sum = jnp.log(jnp.exp(z).sum(axis=-1))  # [...]
    targets_f32 = targets.astype(jnp.float32)
    mass = targets_f32.sum(axis=-1)
    # As products of rows: for the sum of an elementwise product XLA on CPU takes more than twice
    # the time, and twice the size of the logits in memory that its books do not show.
    highest = jax.lax.Precision.HIGHEST
    value = mass * log_sum - jnp.einsum("...k,...k->...", targets_f32, z, precision=highest)
    return value, (logits, targets, temp, row_max, log_sum, mass)


def _backward(residuals, cotangent):
    logits, targets, temp, row_max, log_sum, mass = residuals
    z = logits.astype(jnp.float32) / temp - row_max
    slope = mass[..., None] * jnp.exp(z - log_sum[..., None]) - targets.astype(jnp.float32)
    grad = (cotangent / temp)[..., None] * slope
    return grad.astype(logits.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
