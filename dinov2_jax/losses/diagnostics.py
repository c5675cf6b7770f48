"""Numbers that tell a healthy run from a collapsing one. No gradients, float32 scalars.

Shares of ln K make runs with different numbers of prototypes comparable: a cross-entropy of 1
says nothing has been learnt yet, a teacher entropy of 0 or 1 that it has collapsed.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array


def feature_metrics(cls: Array) -> dict[str, Array]:
    """feature_std and feature_rank of the teacher's CLS features before the head `[..., d]`."""
    features = cls.reshape(-1, cls.shape[-1])
    return {"feature_std": feature_std(features), "feature_rank": feature_rank(features)}


def dino_ce_over_log_k(
    dino_local_loss: Array,
    dino_global_loss: Array,
    *,
    num_local_crops: int,
    num_terms: int,
    num_prototypes: int,
    num_global_crops: int = 2,
) -> Array:
    """Mean cross-entropy of a (student crop, teacher crop) pair, over ln K.

    Args:
      dino_local_loss, dino_global_loss: as `losses.dino` returns them, scales included.
      num_local_crops, num_global_crops: what the losses saw.
      num_terms: the divisor they were given.
      num_prototypes: K; 1 gives 0.

    Returns:
      A scalar, about 1 at initialisation.
    """
    num_pairs = num_global_crops * (num_local_crops + num_global_crops - 1)
    total = (dino_local_loss + dino_global_loss) * (num_terms / num_pairs)
    return share_of_log_k(total, num_prototypes)


def ibot_ce_over_log_k(
    ibot_loss: Array, mask_weights: Array, *, num_crops: int, num_prototypes: int
) -> Array:
    """Mean cross-entropy of a masked patch, over ln K; crops that are not masked do not count.

    Args:
      ibot_loss: as `losses.ibot` returns it.
      mask_weights: those it was given; they sum to the number of masked crops.
      num_crops: the divisor it was given.
      num_prototypes: K; 1 gives 0.

    Returns:
      A scalar, about 1 at initialisation; 0 without masked patches.
    """
    num_masked_crops = mask_weights.sum()
    mean = ibot_loss * num_crops / jnp.where(num_masked_crops > 0, num_masked_crops, 1.0)
    return share_of_log_k(mean, num_prototypes)


def entropy_over_log_k(probs: Array) -> Array:
    """Mean entropy of the rows of `probs [n, k]`, n >= 1, over ln K, in [0, 1]; 0 if K = 1."""
    probs = probs.astype(jnp.float32)
    entropy = -jax.scipy.special.xlogy(probs, probs).sum(axis=-1)  # [n]; 0 ln 0 is 0
    return share_of_log_k(entropy.mean(), probs.shape[-1])


def prototypes_in_use(probs: Array) -> Array:
    """Prototypes that are some row's most likely one, as a share of all K.

    At most n / K for n rows: compare it with itself over time, not between batch sizes.

    Args:
      probs: teacher targets (or logits) `[n, k]`.

    Returns:
      A scalar in [0, 1].
    """
    is_used = jnp.zeros(probs.shape[-1], bool).at[probs.argmax(axis=-1)].set(True)
    return is_used.mean(dtype=jnp.float32)


def feature_std(features: Array) -> Array:
    """Spread of the feature directions: 1 for isotropic features, 0 if all coincide.

    The mean over dimensions of the standard deviation over rows of features scaled to length
    sqrt(d).

    Args:
      features: `[n, d]`, n >= 1.

    Returns:
      A scalar in [0, 1].
    """
    features = features.astype(jnp.float32)
    length = jnp.linalg.norm(features, axis=-1, keepdims=True)
    scaled = features / jnp.maximum(length, 1e-8) * math.sqrt(features.shape[-1])
    return scaled.std(axis=0).mean()


def feature_rank(features: Array) -> Array:
    """Effective number of dimensions that the features vary in: (tr C)^2 / tr C^2.

    C is the covariance over rows. Between 1 and min(n - 1, d); 0 if all rows coincide.

    Args:
      features: `[n, d]`.

    Returns:
      A scalar.
    """
    features = features.astype(jnp.float32)
    centred = features - features.mean(axis=0)
    num_rows, width = features.shape
    # C and the Gram matrix have the same trace and the same sum of squares: take the smaller.
    equation = "nd,md->nm" if num_rows <= width else "nd,ne->de"
    gram = jnp.einsum(equation, centred, centred, precision=jax.lax.Precision.HIGHEST)
    trace = jnp.trace(gram)
    gram = gram / jnp.where(trace > 0, trace, 1.0)  # before squaring: no under- or overflow
    return jnp.where(trace > 0, 1.0 / jnp.square(gram).sum(), 0.0)


def share_of_log_k(value: Array, num_prototypes: int) -> Array:
    """`value / ln K`, and 0 for a single prototype, where nothing is left to choose."""
    return value / math.log(num_prototypes) if num_prototypes > 1 else jnp.zeros_like(value)
