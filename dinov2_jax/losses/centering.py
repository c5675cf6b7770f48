"""Turning teacher logits into targets without collapse: softmax centering or Sinkhorn-Knopp.

Pure functions on global arrays: under jit the sums over a sharded batch become the reference's
all-reduces. Everything is float32. Behaviour follows dinov2/loss/dino_clstoken_loss.py and
dinov2/loss/ibot_patch_loss.py (Apache-2.0), with the center as an argument and a result, padding
rows of weight 0, and Sinkhorn-Knopp as scaling vectors on one stored matrix.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

# What Sinkhorn-Knopp's v is larger by, and u smaller: products of v and the smallest entries of the
# matrix underflow then in no form of the sums. Targets have v * u, and it is a power of 2: exact.
LIFT = 2.0**40


def softmax_center(logits: Array, center: Array, temp: ArrayLike) -> Array:
    """Teacher targets by centering and sharpening: softmax((logits - center) / temp).

    Args:
      logits: teacher logits `[..., k]`.
      center: running mean of teacher logits `[k]`, of the steps before this one.
      temp: teacher temperature, > 0.

    Returns:
      Probabilities `[..., k]`, float32; rows sum to 1.

    References:
      Caron et al. 2021, arXiv 2104.14294, section 3.1; dinov2/loss/dino_clstoken_loss.py.
    """
    return jax.nn.softmax((logits.astype(jnp.float32) - center) / temp, axis=-1)


def update_center(
    center: Array, logits: Array, *, momentum: float, row_weights: Array | None = None
) -> Array:
    """Moves the center towards the mean of the teacher's logits.

    center <- momentum * center + (1 - momentum) * sum_n(w_n * logits_n) / sum_n(w_n)

    Apply it after `softmax_center` in a step: the reference uses a batch's mean from the next
    step on.

    Args:
      center: `[k]`.
      logits: teacher logits `[n, k]` of the whole batch.
      momentum: in [0, 1]; 0.9 in the reference.
      row_weights: `[n]`, >= 0; 0 for padding. None: all 1. The reference's iBOT center is the
        mean over GPUs of each GPU's mean: that is 1 / (real rows of the group) here.

    Returns:
      The new center `[k]`, float32; the old one if no row has weight.
    """
    logits = logits.astype(jnp.float32)
    if row_weights is None:
        row_weights = jnp.ones(logits.shape[0], jnp.float32)
    total = row_weights.sum()
    weighted_sum = jnp.einsum("n,nk->k", row_weights, logits, precision=jax.lax.Precision.HIGHEST)
    mean = weighted_sum / jnp.where(total > 0, total, 1.0)
    return move_center(center, mean, total, momentum=momentum)


def move_center(center: Array, mean: Array, total: Array, *, momentum: float) -> Array:
    """The center's step towards a batch's `mean [k]`; none if the rows' weights `total` 0."""
    return jnp.where(total > 0, momentum * center + (1 - momentum) * mean, center)


def sinkhorn_knopp(
    logits: Array,
    temp: ArrayLike,
    *,
    row_weights: Array | None = None,
    num_iters: int = 3,
) -> Array:
    """Teacher targets in which, nearly, all prototypes are used equally.

    In plain loops, with n the real rows:

        q[i, j] = exp(logits[i, j] / temp)
        repeat num_iters times:
            for each prototype j: q[:, j] /= k * sum_i q[i, j]
            for each row i:       q[i, :] /= n * sum_j q[i, j]
        q *= n

    which only ever multiplies rows and columns: q = v[i] * e[i, j] * u[j], so the loop runs on the
    vectors u and v and the matrix e is read, never rewritten. A shift of row i's logits moves
    between e and v. Here e is shifted by each row's maximum and the *first* v puts it back up to
    one scalar for all rows, which the first division cancels: no overflow at any logits, and no
    row vanishes however far below the batch's maximum it lies. (Leaving the row shift out of v
    would give other targets: the first sum is over rows.) An entry below `lowest_logit` is 0.

    Args:
      logits: teacher logits `[n, k]` of the whole batch: of all devices.
      temp: teacher temperature, > 0.
      row_weights: `[n]`, 1 for real rows and 0 for padding. None: all real.
      num_iters: >= 1; 3 in the reference.

    Returns:
      Probabilities `[n, k]`, float32; real rows sum to 1, padding rows are 0.

    Raises:
      ValueError: if num_iters < 1.

    References:
      Caron et al. 2020, arXiv 2006.09882, section 3.1; dinov2/loss/dino_clstoken_loss.py.
    """
    if num_iters < 1:
        raise ValueError(f"{num_iters=} must be at least 1; use 3 as the reference does")
    logits = logits.astype(jnp.float32)
    num_rows, num_prototypes = logits.shape
    is_real = jnp.ones(num_rows, bool) if row_weights is None else row_weights > 0
    # Targets do not depend on this share; it keeps u and v from growing with the iterations.
    share = jnp.maximum(is_real.sum(), 1) / num_prototypes

    row_max = logits.max(axis=1)  # [n]
    shift = jnp.where(is_real, row_max, -jnp.inf).max()
    shifted = logits - row_max[:, None]
    scaled = jnp.where(shifted < lowest_logit(temp), 0.0, jnp.exp(shifted / temp))  # [n, k], <= 1
    v = jnp.where(is_real, LIFT * jnp.exp((row_max - shift) / temp), 0.0)  # [n]

    smallest = jnp.finfo(jnp.float32).tiny
    floor = prototype_floor(share)
    highest = jax.lax.Precision.HIGHEST
    for _ in range(num_iters):
        per_prototype = jnp.einsum("nk,n->k", scaled, v, precision=highest)
        u = share / jnp.maximum(per_prototype, floor)
        per_row = jnp.einsum("nk,k->n", scaled, u, precision=highest)
        v = jnp.where(is_real, 1.0 / jnp.maximum(per_row, smallest), 0.0)
    return scaled * u * v[:, None]


def prototype_floor(share: Array) -> Array:
    """The smallest sum of a prototype over rows that Sinkhorn-Knopp divides by.

    A prototype that is below `lowest_logit` in every row stays unused: the floor keeps its
    `u = share / sum` finite, so that 0 * u is 0.
    """
    return LIFT * 4 * jnp.maximum(share, 1.0) * jnp.finfo(jnp.float32).tiny


def lowest_logit(temp: ArrayLike) -> ArrayLike:
    """How far below its row's largest, as a negative number, a logit counts in Sinkhorn-Knopp.

    exp(-87) is the last whole power that float32 holds in full: what lies lower may be a few bits
    or 0, by chip and compiler, and u of up to e^86 makes weight of it. So every form of these
    targets cuts here, by comparing logits: before a power, a division or a logarithm rounds them.
    """
    return -87.0 * temp
