"""KoLeo regulariser: spreads the image features of a group apart.

Student CLS features (before the head) in, a scalar out, float32 throughout. Behaviour follows
dinov2/loss/koleo_loss.py (Apache-2.0), whose batch is one GPU's: a group here. Departures: a
feature is never its own neighbour, a group of 1 gives 0, and values and gradients are finite at
duplicates and at zero features.
"""

import jax
import jax.numpy as jnp
from jax import Array


def koleo_loss(features: Array, *, eps: float = 1e-8) -> Array:
    """Minus the mean log distance to the nearest neighbour, summed over the crops.

        loss = 0
        for c in crops:
            for s in groups:
                x = features[c, s] / max(norm(features[c, s]), eps)
                for i in range(q):
                    j = argmax_{j != i} x[i] . x[j]
                    loss -= log(norm(x[i] - x[j] + eps) + eps) / (q * num_groups)

    Gradients flow into both features of a pair, not through the choice of the neighbour.

    Args:
      features: `[g, s, q, d]`: crops, groups, images of a group; neighbours are searched within
        one crop of one group.
      eps: as in the reference, added to the difference and to the distance.

    Returns:
      A float32 scalar; 0 for groups of 1 image.

    References:
      Sablayrolles et al. 2019, arXiv 1806.03198, section 3; dinov2/loss/koleo_loss.py; the sum
      over crops: dinov2/train/ssl_meta_arch.py lines 316-320.
    """
    num_crops, _, group_size, _ = features.shape
    if group_size == 1:
        return jnp.zeros((), jnp.float32)
    features = features.astype(jnp.float32)
    # sqrt(max(x, tiny)) has a finite derivative everywhere; the value is torch's.
    squared_norm = jnp.square(features).sum(axis=-1, keepdims=True)
    x = features / jnp.sqrt(jnp.maximum(squared_norm, eps**2))

    neighbors = jax.lax.stop_gradient(_nearest(jax.lax.stop_gradient(x)))  # [g, s, q]
    difference = x - jnp.take_along_axis(x, neighbors[..., None], axis=2) + eps
    distance = jnp.sqrt(jnp.maximum(jnp.square(difference).sum(axis=-1), eps**2 * eps**2))
    return -jnp.log(distance + eps).mean() * num_crops


def _nearest(x: Array) -> Array:
    """Index of each unit vector's nearest other one: `[..., q, d]` to `[..., q]`."""
    # HIGHEST: the TPU's default for float32 matmuls is bfloat16, which confuses neighbours.
    dots = jnp.einsum("...qd,...rd->...qr", x, x, precision=jax.lax.Precision.HIGHEST)
    # The reference writes -1 on the diagonal, which ties with an exactly opposite neighbour: the
    # optimum of a group of two. -2 lies below every dot product of unit vectors.
    return jnp.argmax(jnp.where(jnp.eye(x.shape[-2], dtype=bool), -2.0, dots), axis=-1)
