"""Losses of dense heads: pure functions of maps and targets, a scalar out.

Targets are larger than maps, and maps are stretched to them image by image, so that memory does
not grow with the batch. Behaviour follows mmseg's cross-entropy and dinov2/eval/depth/models/losses
(Apache-2.0).
"""

import jax
import jax.numpy as jnp

from dinov2_jax.evals.dense.mask_sets import IGNORED
from dinov2_jax.models.task_heads.resize import resize_bilinear

SIGMA, SIGLOSS_WARMUP_STEPS = 0.15, 100
_EPS = 1e-3
# Strides of the gradient loss.
_STRIDES = (1, 2, 4, 6)


def cross_entropy(logits: jax.Array, classes: jax.Array, *, over_all: bool = True) -> jax.Array:
    """Mean cross-entropy of stretched logits.

    Args:
      logits: `[b, h, w, classes]`, of patches.
      classes: integers `[b, height, width]`, `IGNORED` where nothing is asked.
      over_all: whether the sum is divided by all pixels, as in mmseg, or by the labelled ones.
    """

    @jax.checkpoint
    def of_image(logits: jax.Array, classes: jax.Array) -> jax.Array:
        full = resize_bilinear(logits[None], classes.shape, align_corners=False)[0]
        picked = jnp.take_along_axis(full, jnp.maximum(classes, 0)[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(full, axis=-1) - picked
        return jnp.sum(jnp.where(classes == IGNORED, 0, loss))

    classes = classes.astype(jnp.int32)
    sums = jax.lax.map(lambda x: of_image(*x), (logits.astype(jnp.float32), classes))
    labelled = jnp.maximum(jnp.sum(classes != IGNORED), 1)
    return jnp.sum(sums) / (classes.size if over_all else labelled)


def depth_loss(
    maps: jax.Array,
    depth: jax.Array,
    step: jax.Array,
    *,
    warmup_steps: int = SIGLOSS_WARMUP_STEPS,
    gradient_weight: float = 0.0,
    images_per_loss: int = 2,
) -> jax.Array:
    """SigLoss, and the gradient loss where it has a weight, of stretched maps.

    Args:
      maps: metres `[b, h, w]`.
      depth: metres `[b, height, width]`, 0 where nothing was measured.
      step: updates done.
      warmup_steps: the first updates, in which SigLoss is without its variance, so that only the
        scale is learnt.
      gradient_weight: the reference's is 0.5, of a loss that is 0 there by an error.
      images_per_loss: the loss is taken of so many images, and the mean over such groups: the
        reference has 2 on each of 8 GPUs. 0, or what does not divide the batch: all.
    """
    size = images_per_loss if images_per_loss and len(maps) % images_per_loss == 0 else len(maps)

    def of_group(group: tuple[jax.Array, jax.Array]) -> jax.Array:
        maps, depth = group
        maps = resize_bilinear(maps[..., None], depth.shape[1:3], align_corners=False)[..., 0]
        loss = sig_loss(maps, depth, is_warmup=step < warmup_steps)
        if gradient_weight:
            loss += gradient_weight * gradient_loss(maps, depth)
        return loss

    groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (maps, depth))
    return jnp.mean(jax.lax.map(of_group, groups))


def sig_loss(predicted: jax.Array, depth: jax.Array, *, is_warmup: jax.Array) -> jax.Array:
    """`sqrt(var(g) + 0.15 mean(g)^2)`, `g = log(predicted + 1e-3) - log(depth + 1e-3)`.

    Over all pixels with depth; the variance is unbiased, and left out in the warm-up.

    Args:
      predicted, depth: metres `[..]`; depth is 0 where nothing was measured.
      is_warmup: a truth value.
    """
    is_valid = depth > 0
    g = jnp.where(is_valid, jnp.log(predicted + _EPS) - jnp.log(depth + _EPS), 0)
    count = jnp.sum(is_valid)
    mean = jnp.sum(g) / jnp.maximum(count, 1)
    variance = jnp.sum(jnp.where(is_valid, g - mean, 0) ** 2) / jnp.maximum(count - 1, 1)
    squared = jnp.where(is_warmup, 0, variance) + SIGMA * mean**2
    # The slope of the root is infinite at 0, where a group without any depth is.
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def gradient_loss(predicted: jax.Array, depth: jax.Array) -> jax.Array:
    """How much log depth changes otherwise than it should over two pixels, at four strides.

    The reference slices the batch and the channel in place of rows and columns; here it is as it
    was meant.

    Args:
      predicted, depth: metres `[b, height, width]`; depth is 0 where nothing was measured.
    """
    total = 0.0
    for stride in _STRIDES:
        p, t = predicted[:, ::stride, ::stride], depth[:, ::stride, ::stride]
        is_valid = t > 0
        g = jnp.where(is_valid, jnp.log(p + _EPS) - jnp.log(t + _EPS), 0)
        down = jnp.abs(g[:, :-2] - g[:, 2:]) * (is_valid[:, :-2] & is_valid[:, 2:])
        across = jnp.abs(g[:, :, :-2] - g[:, :, 2:]) * (is_valid[:, :, :-2] & is_valid[:, :, 2:])
        total += (jnp.sum(down) + jnp.sum(across)) / jnp.maximum(jnp.sum(is_valid), 1)
    return total
