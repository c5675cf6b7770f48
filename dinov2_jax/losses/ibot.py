"""iBOT loss: the student predicts the teacher's targets at the patches hidden from it.

Padded rows of masked patches in, a scalar out, with the reference's scale. Behaviour follows
`forward_masked` of dinov2/loss/ibot_patch_loss.py (Apache-2.0).
"""

from jax import Array

from dinov2_jax.losses.linear_cross_entropy import linear_cross_entropy


def ibot_loss(
    features: Array,
    weight: Array,
    teacher_probs: Array,
    mask_weights: Array,
    *,
    student_temp: float,
    num_crops: int,
) -> Array:
    """Mean over all global crops of the mean cross-entropy over a crop's masked patches.

        loss = 0
        for i in global crops:                            # 2 * batch, also the unmasked ones
            for p in masked patches of crop i:
                loss += CE(teacher_probs[p], student_logits[p]) / num_masked(i) / num_crops

    A patch of a heavily masked crop therefore counts less than one of a lightly masked crop. The
    reference multiplies by 2 * 1/2; its log shows half of this value.

    Args:
      features: the student's before the prototypes `[..., m, d]`.
      weight: the student's prototypes `[k, d]`: its logits are the products of both.
      teacher_probs: `[..., m, k]`; any finite value in padding rows.
      mask_weights: `[..., m]`, 1 / (masked patches of the row's crop), 0 for padding.
      student_temp: 0.1 in the reference.
      num_crops: global crops in the whole batch, masked or not: 2 * global batch size.

    Returns:
      A float32 scalar; 0 without masked patches.

    References:
      dinov2/loss/ibot_patch_loss.py `forward_masked`; dinov2/train/ssl_meta_arch.py 325-343.
    """
    row_weights = mask_weights / num_crops
    return linear_cross_entropy(features, weight, teacher_probs, row_weights, student_temp)[0]


def mean_over_masked(per_patch: Array, mask_weights: Array, *, num_crops: int) -> Array:
    """The last step of `ibot_loss`: `per_patch [..., m]` to a scalar."""
    return (mask_weights * per_patch).sum() / num_crops
