"""Cross-entropy of the prototypes' logits against soft targets, with its gradients at once.

Features, prototypes and targets in, one float32 number out. Behaviour follows the sum of
target * log_softmax in dinov2/loss/dino_clstoken_loss.py and ibot_patch_loss.py (Apache-2.0). What
the logits' gradient needs is there as soon as the loss is, so the forward pass goes on to the
gradients of features and prototypes and forgets everything of size [n, k].
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dinov2_jax.sharding import shard_rows


@jax.custom_vjp
def linear_cross_entropy(
    features: Array, weight: Array, targets: Array, row_weights: Array, temp: ArrayLike
) -> tuple[Array, tuple[Array, Array]]:
    """sum_n row_weights[n] * -sum_k targets[n, k] * log_softmax(features @ weight.T / temp)[n, k].

    The backward pass only scales two gradients by the cotangent. Without a gradient to take, none
    is computed.

    Args:
      features: `[s, ..., d]`; groups `s` are what a mesh cuts.
      weight: the prototypes `[k, d]`; the logits are products in its dtype, summed in float32.
      targets: `[s, ..., k]`, >= 0; rows may sum to any number.
      row_weights: `[s, ...]`, 0 for padding. Like the targets and temp a constant: no gradient.
      temp: student temperature, > 0.

    Returns:
      The loss [], and for the books, without gradients, the cross-entropy and the entropy of
      softmax(features @ weight.T / temp), in nats, of each row `[s, ...]`. All float32.
    """
    with jax.named_scope("prototypes"):
        return _rows(features, weight, targets, row_weights, temp)[0]


def _rows(features, weight, targets, row_weights, temp):
    """The result, and what the logits' gradient is made of: rows are one axis in it.

    With two, XLA on CPU transposes [s, m, k] before it multiplies it by [s, m, d].
    """
    row_shape = row_weights.shape
    z = features.astype(weight.dtype).reshape(-1, features.shape[-1])
    logits = jnp.einsum("nd,kd->nk", z, weight, preferred_element_type=jnp.float32)
    logits = shard_rows(logits, last="model")
    targets = shard_rows(targets.astype(jnp.float32).reshape(logits.shape), last="model")
    # Less the maximum, which leaves both results as they are: at any logits nothing large cancels.
    x = (logits - logits.max(axis=-1, keepdims=True)) / temp
    exp_x = jnp.exp(x)
    exp_sum, mass = _dot_rows(exp_x), _dot_rows(targets)
    log_sum = jnp.log(exp_sum)
    cross_entropy = mass * log_sum - _dot_rows(targets, x)
    entropy = log_sum - _dot_rows(exp_x, x) / exp_sum
    books = cross_entropy.reshape(row_shape), entropy.reshape(row_shape)
    loss = (row_weights * books[0]).sum()
    return (loss, books), (z, targets, exp_x, mass / exp_sum)


def _dot_rows(x: Array, y: Array | None = None) -> Array:
    """sum(x * y) over the last axis; without y, sum(x).

    As products: for the sum of an elementwise product XLA on CPU takes more than twice the time,
    and memory for another [n, k].
    """
    if y is None:
        return jnp.einsum("nk,k->n", x, jnp.ones(x.shape[-1]), precision="highest")
    return jnp.einsum("nk,nk->n", x, y, precision="highest")


@jax.named_scope("prototypes")
def _forward(features, weight, targets, row_weights, temp):
    result, (z, targets, exp_x, scale) = _rows(features, weight, targets, row_weights, temp)
    row_scale = row_weights.reshape(-1) / temp
    slope = (row_scale * scale)[:, None] * exp_x - row_scale[:, None] * targets  # of the logits
    to_features = jnp.einsum("nk,kd->nd", slope, weight, preferred_element_type=jnp.float32)
    to_weight = jnp.einsum("nk,nd->kd", slope, z, preferred_element_type=jnp.float32)
    to_features = to_features.reshape(features.shape)
    return result, (to_features.astype(features.dtype), to_weight.astype(weight.dtype))


def _backward(gradients, cotangents):
    to_features, to_weight = gradients
    cotangent = cotangents[0]
    to_features = (cotangent * to_features).astype(to_features.dtype)
    to_weight = (cotangent * to_weight).astype(to_weight.dtype)
    return to_features, to_weight, None, None, None


linear_cross_entropy.defvjp(_forward, _backward)
