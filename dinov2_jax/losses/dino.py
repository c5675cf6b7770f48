"""DINO loss on image-level features: local crops, and global crops against each other.

Student features and teacher targets in, a scalar out, with the reference's scale. Behaviour follows
dinov2/loss/dino_clstoken_loss.py and the scales of dinov2/train/ssl_meta_arch.py (Apache-2.0);
pairs that share a factor are summed before the cross-entropy.
"""

import math

import jax.numpy as jnp
from jax import Array

from dinov2_jax.losses.diagnostics import share_of_log_k
from dinov2_jax.losses.linear_cross_entropy import linear_cross_entropy


def num_loss_terms(*, num_global_crops: int, num_local_crops: int) -> int:
    """The divisor of both DINO losses: 18 for 2 global and 8 local crops.

    It counts pairs of different crops, but never fewer than 1 for the locals: 3, not 2, without
    local crops (dinov2/train/ssl_meta_arch.py lines 150-151).
    """
    return max(num_local_crops * num_global_crops, 1) + (num_global_crops - 1) * num_global_crops


def dino_loss(
    features: Array,
    weight: Array,
    teacher_probs: Array,
    *,
    num_global_crops: int,
    num_terms: int,
    student_temp: float,
) -> tuple[Array, dict[str, Array]]:
    """Every crop predicts the targets of the global crops, but no crop its own.

        loss = 0
        for s in all crops:
            for t in global crops:
                if s != t:
                    loss += mean_b(CE(teacher_probs[t, b], student_logits[s, b])) / num_terms

    The cross-entropy is linear in its target, so the targets are summed over t first.

    Args:
      features: the student's before the prototypes `[..., g + l, b, d]`: global crops, which are
        masked, then local crops; l may be 0. Leading axes (groups) are averaged over.
      weight: the student's prototypes `[k, d]`: its logits are the products of both.
      teacher_probs: `[..., g, b, k]`, same order of crops (not swapped).
      num_global_crops: g.
      num_terms: from `num_loss_terms`.
      student_temp: 0.1 in the reference.

    Returns:
      The loss, a float32 scalar, and its `dino_parts`, which have no gradients.

    References:
      DINOv2, arXiv 2304.07193, section 4; dinov2/train/ssl_meta_arch.py lines 164-167 (the swap),
      281-293 (local crops) and 295-312 (global crops and the scale 2 / terms).
    """
    num_local_crops = features.shape[-3] - num_global_crops
    targets = targets_of_crops(teacher_probs, num_local_crops=num_local_crops)
    rows_per_crop = math.prod(features.shape[:-1]) // features.shape[-3]
    row_weights = jnp.full(features.shape[:-1], 1 / (rows_per_crop * num_terms))
    loss, books = linear_cross_entropy(features, weight, targets, row_weights, student_temp)
    return loss, dino_parts(
        *books,
        num_global_crops=num_global_crops,
        num_terms=num_terms,
        num_prototypes=weight.shape[0],
    )


def dino_parts(
    cross_entropy: Array,
    entropy: Array,
    *,
    num_global_crops: int,
    num_terms: int,
    num_prototypes: int,
) -> dict[str, Array]:
    """What there is to know of the loss, from its rows `[..., g + l, b]`, as float32 scalars.

    dino_global_loss and dino_local_loss are the parts of global and local crops, 0 without any;
    student_entropy is the mean entropy of the student's softmax on global crops, over ln k.
    """

    def crops(rows: Array) -> tuple[Array, Array]:
        per_crop = jnp.moveaxis(rows, -2, 0).reshape(rows.shape[-2], -1).mean(axis=-1)  # [g + l]
        return per_crop[:num_global_crops], per_crop[num_global_crops:]

    of_global, of_local = crops(cross_entropy)
    return {
        "dino_global_loss": of_global.sum() / num_terms,
        "dino_local_loss": of_local.sum() / num_terms,
        "student_entropy": share_of_log_k(crops(entropy)[0].mean(), num_prototypes),
    }


def local_targets(teacher_probs: Array) -> Array:
    """What local crops predict, the sum over global ones: `[..., g, b, k]` to `[..., 1, b, k]`."""
    return teacher_probs.astype(jnp.float32).sum(axis=-3, keepdims=True)


def global_targets(teacher_probs: Array) -> Array:
    """What each global crop predicts, the sum over the others: `[..., g, b, k]` to the same."""
    teacher_probs = teacher_probs.astype(jnp.float32)
    # With two crops the sum over the others is the other one: a flip, and no cancellation.
    if teacher_probs.shape[-3] == 2:
        return jnp.flip(teacher_probs, axis=-3)
    return teacher_probs.sum(axis=-3, keepdims=True) - teacher_probs


def targets_of_crops(teacher_probs: Array, *, num_local_crops: int) -> Array:
    """The targets of the global, then the local crops: `[..., g, b, k]` to `[..., g + l, b, k]`."""
    summed = jnp.repeat(local_targets(teacher_probs), num_local_crops, axis=-3)
    return jnp.concatenate([global_targets(teacher_probs), summed], axis=-3)
