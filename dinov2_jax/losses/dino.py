"""DINO loss on image-level logits: local crops, and global crops against each other.

Student logits and teacher targets in, a scalar out, with the reference's scale. Behaviour follows
dinov2/loss/dino_clstoken_loss.py and the scales of dinov2/train/ssl_meta_arch.py (Apache-2.0);
pairs that share a factor are summed before the cross-entropy.
"""

import jax.numpy as jnp
from jax import Array

from dinov2_jax.losses.cross_entropy import cross_entropy


def num_loss_terms(*, num_global_crops: int, num_local_crops: int) -> int:
    """The divisor of both DINO losses: 18 for 2 global and 8 local crops.

    It counts pairs of different crops, but never fewer than 1 for the locals: 3, not 2, without
    local crops (dinov2/train/ssl_meta_arch.py lines 150-151).
    """
    return max(num_local_crops * num_global_crops, 1) + (num_global_crops - 1) * num_global_crops


def dino_local_loss(
    student_logits: Array, teacher_probs: Array, *, student_temp: float, num_terms: int
) -> Array:
    """Every local crop predicts every global crop's target.

        loss = 0
        for v in local crops:
            for t in global crops:
                loss += mean_b(CE(teacher_probs[t, b], student_logits[v, b])) / num_terms

    The cross-entropy is linear in its target, so the targets are summed over t first.

    Args:
      student_logits: `[..., l, b, k]`; l may be 0. Leading axes (groups) are averaged over.
      teacher_probs: `[..., g, b, k]`.
      student_temp: 0.1 in the reference.
      num_terms: from `num_loss_terms`.

    Returns:
      A float32 scalar; 0 without local crops.

    References:
      DINOv2, arXiv 2304.07193, section 4; dinov2/train/ssl_meta_arch.py lines 281-293.
    """
    num_local_crops = student_logits.shape[-3]
    if num_local_crops == 0:
        return jnp.zeros((), jnp.float32)
    targets = local_targets(teacher_probs)
    return cross_entropy(student_logits, targets, student_temp).mean() * num_local_crops / num_terms


def dino_global_loss(
    student_logits: Array, teacher_probs: Array, *, student_temp: float, num_terms: int
) -> Array:
    """Each global crop predicts the other's target.

        loss = 0
        for s in global crops:
            for t in global crops:
                if s != t:
                    loss += mean_b(CE(teacher_probs[t, b], student_logits[s, b])) / num_terms

    Args:
      student_logits: `[..., g, b, k]`, of the masked crops. Leading axes are averaged over.
      teacher_probs: `[..., g, b, k]`, same order of crops (not swapped).
      student_temp: 0.1 in the reference.
      num_terms: from `num_loss_terms`.

    Returns:
      A float32 scalar.

    References:
      dinov2/train/ssl_meta_arch.py lines 164-167 (the swap) and 295-312 (the scale 2 / terms).
    """
    num_global_crops = student_logits.shape[-3]
    targets = global_targets(teacher_probs)
    return (
        cross_entropy(student_logits, targets, student_temp).mean() * num_global_crops / num_terms
    )


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
