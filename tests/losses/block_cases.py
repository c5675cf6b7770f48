"""Rows and prototypes for the tests of the block forms, and their dense counterparts."""

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.losses import centering
from dinov2_jax.losses.blocks import Prototypes
from dinov2_jax.models.heads import row_norms

TEMP = 0.05


def unit_vectors(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw_prototypes(rng: np.random.Generator, k: int, d: int, *, dtype=jnp.float32) -> Prototypes:
    """Directions of any length, and lengths away from their initial 1."""
    weight_v = rng.standard_normal((k, d)).astype(np.float32)
    weight_g = rng.uniform(0.5, 1.5, (k, 1)).astype(np.float32)
    return make_prototypes(weight_v, weight_g, dtype=dtype)


def make_prototypes(weight_v, weight_g, *, dtype=jnp.float32) -> Prototypes:
    return Prototypes(weight_v, weight_g, row_norms(weight_v), jnp.dtype(dtype))


def cross_entropy(logits, targets, temp):
    """Of each row [...], by the formula alone."""
    return -(targets * jax.nn.log_softmax(logits / temp, axis=-1)).sum(axis=-1)


def dense_targets(kind: str, logits, *, center, is_real, temp=TEMP):
    """Probabilities [..., k] of `centering`, over all rows at once."""
    rows = logits.reshape(-1, logits.shape[-1])
    if kind == "softmax_center":
        probs = centering.softmax_center(rows, center, temp)
    else:
        weights = jnp.asarray(is_real, jnp.float32).reshape(-1)
        probs = centering.sinkhorn_knopp(rows, temp, row_weights=weights)
    return probs.reshape(logits.shape)
