"""Two ways through the prototypes, equal up to rounding: `DenseHeads` and `BlockHeads`.

Dense writes down logits and targets `[rows, k]`; blocks keep features and three numbers per row,
and visit the prototypes again whenever their logits are needed. Both turn a head and its features
into targets, losses and metrics by the same methods, so that the objective does not know which.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from dinov2_jax.losses import block_targets, diagnostics, dino
from dinov2_jax.losses.block_cross_entropy import block_cross_entropy
from dinov2_jax.losses.blocks import Layout, Prototypes, choose_layout
from dinov2_jax.losses.centering import sinkhorn_knopp, softmax_center, update_center
from dinov2_jax.losses.ibot import ibot_loss, mean_over_masked
from dinov2_jax.models.heads import Head, row_norms
from dinov2_jax.sharding import shard_rows


class HeadMode(Protocol):
    """What the objective asks of the prototypes. Rows have groups `s` on their leading axis.

    A target is a pair of pytrees: what belongs to rows (leading axes as theirs), and what all rows
    share. Padding rows count for nothing in it.
    """

    def rows(self, head: Head, features: Array) -> Array:
        """What to keep of the teacher's features `[s, ..., d]` until all of the batch is there."""

    def targets(
        self,
        head: Head,
        rows: Array,
        *,
        is_real: Array,
        center: Array,
        temp: Array,
        centering: str,
        num_sinkhorn_iters: int,
        center_momentum: float,
    ) -> tuple[tuple, Array]:
        """The target of a whole batch's rows `[s, ..., .]`, and the next center `[k]`.

        `is_real [s, ...]` is False for padding, `temp` the teacher's temperature, `centering`
        "sinkhorn_knopp" or "softmax_center", which alone moves the center.
        """

    def target_metrics(self, head: Head, target: tuple) -> dict[str, Array]:
        """teacher_entropy and prototypes_in_use of a target without padding."""

    def dino_loss(
        self,
        head: Head,
        features: Array,
        target: tuple,
        *,
        num_global_crops: int,
        num_terms: int,
        student_temp: float,
    ) -> tuple[Array, dict[str, Array]]:
        """The loss, and without gradients what it is made of.

        That is dino_global_loss, dino_local_loss, whose sum it is, and student_entropy: on global
        crops, over ln k. `features [s, g + l, b, d]`: of the student's global, then local crops;
        the target is of the global crops `[s, g, b]`.
        """

    def ibot_loss(
        self,
        head: Head,
        features: Array,
        target: tuple,
        mask_weights: Array,
        *,
        num_crops: int,
        student_temp: float,
    ) -> Array:
        """See `losses.ibot.ibot_loss`; `features [s, m, d]` of the masked patches."""


@dataclasses.dataclass(frozen=True)
class DenseHeads:
    """Logits and targets are arrays `[rows, k]`: fastest where they fit and are small."""

    def rows(self, head, features):
        return head.logits(features)

    def targets(
        self,
        head,
        rows,
        *,
        is_real,
        center,
        temp,
        centering,
        num_sinkhorn_iters,
        center_momentum,
    ):
        logits = shard_rows(rows.reshape(-1, rows.shape[-1]), last="model")
        if centering == "sinkhorn_knopp":
            probs = sinkhorn_knopp(
                logits, temp, row_weights=is_real.reshape(-1), num_iters=num_sinkhorn_iters
            )
        else:
            probs = softmax_center(logits, center, temp)
            center = update_center(
                center,
                logits,
                row_weights=_group_mean_weights(is_real).reshape(-1),
                momentum=center_momentum,
            )
        return (probs.reshape(rows.shape), ()), center

    def target_metrics(self, head, target):
        probs = target[0].reshape(-1, head.num_prototypes)
        return {
            "teacher_entropy": diagnostics.entropy_over_log_k(probs),
            "prototypes_in_use": diagnostics.prototypes_in_use(probs),
        }

    def dino_loss(self, head, features, target, *, num_global_crops, num_terms, student_temp):
        return dino.dino_loss(
            head.bottleneck(features),
            head.prototypes(),
            target[0],
            num_global_crops=num_global_crops,
            num_terms=num_terms,
            student_temp=student_temp,
        )

    def ibot_loss(self, head, features, target, mask_weights, *, num_crops, student_temp):
        return ibot_loss(
            head.bottleneck(features),
            head.prototypes(),
            target[0],
            mask_weights,
            student_temp=student_temp,
            num_crops=num_crops,
        )


@dataclasses.dataclass(frozen=True)
class BlockHeads:
    """No array `[rows, k]`: prototypes are visited in blocks, again for each use.

    Attributes:
      block_size: prototypes of a block on one device; 0: `blocks.choose_layout` decides.
      has_kernels: whether Pallas kernels for TPU make the passes that there are some for:
        Sinkhorn-Knopp, and the iBOT loss.
    """

    block_size: int = 0
    has_kernels: bool = False

    def rows(self, head, features):
        return head.bottleneck(features)

    def targets(
        self,
        head,
        rows,
        *,
        is_real,
        center,
        temp,
        centering,
        num_sinkhorn_iters,
        center_momentum,
    ):
        prototypes, layout = _prototypes(head), self._layout(head, rows)
        if centering == "sinkhorn_knopp":
            target_rows, shared = block_targets.sinkhorn_knopp(
                rows,
                prototypes,
                temp,
                is_real=is_real,
                num_iters=num_sinkhorn_iters,
                layout=layout,
            )
        else:
            target_rows, shared = block_targets.softmax_center(
                rows, prototypes, center, temp, layout=layout
            )
            center = block_targets.update_center(
                center,
                rows,
                prototypes,
                row_weights=_group_mean_weights(is_real),
                momentum=center_momentum,
                layout=layout,
            )
        return (target_rows, (shared, temp)), center

    def target_metrics(self, head, target):
        rows, (shared, temp) = target
        entropy, best = block_targets.target_statistics(
            rows, shared, temp, layout=self._layout(head, rows.features)
        )
        k = head.num_prototypes
        is_used = jnp.zeros(k, bool).at[best.reshape(-1)].set(True)
        return {
            "teacher_entropy": diagnostics.share_of_log_k(entropy.mean(), k),
            "prototypes_in_use": is_used.mean(dtype=jnp.float32),
        }

    def dino_loss(self, head, features, target, *, num_global_crops, num_terms, student_temp):
        num_local_crops = features.shape[1] - num_global_crops
        assign = functools.partial(dino.targets_of_crops, num_local_crops=num_local_crops)
        loss, entropy = self._cross_entropy(head, features, target, student_temp, assign)
        parts = dino.dino_parts(
            loss,
            entropy,
            num_global_crops=num_global_crops,
            num_terms=num_terms,
            num_prototypes=head.num_prototypes,
        )
        total = parts["dino_global_loss"] + parts["dino_local_loss"]
        return total, jax.lax.stop_gradient(parts)

    def ibot_loss(self, head, features, target, mask_weights, *, num_crops, student_temp):
        loss, _ = self._cross_entropy(head, features, target, student_temp, None)
        return mean_over_masked(loss, mask_weights, num_crops=num_crops)

    def _layout(self, head: Head, features: Array) -> Layout:
        *row_shape, width = features.shape
        return choose_layout(
            tuple(row_shape),
            head.num_prototypes,
            width=width,
            block_size=self.block_size,
            has_kernels=self.has_kernels,
        )

    def _cross_entropy(self, head, features, target, student_temp, assign):
        bottleneck = head.bottleneck(features)
        rows, (shared, teacher_temp) = target
        return block_cross_entropy(
            self._layout(head, bottleneck),
            assign,
            bottleneck,
            _prototypes(head),
            rows,
            shared,
            (student_temp, teacher_temp),
        )


# Dense heads are fewer products, and faster on a CPU, so blocks are for what would not fit; on a
# TPU kernels win in both. docs/performance.md, "Prototype losses", has the measurements.
MAX_DENSE_BYTES = 2 * 2**30
MAX_DENSE_SHARE = 1 / 8


def choose_head_mode(
    heads: str, *, platform: str, logit_bytes: int, memory_bytes: int | None, block_size: int = 0
) -> HeadMode:
    """The mode that `heads` ("auto", "dense", "blocks" or "pallas") means.

    Args:
      heads: "pallas" is blocks by kernels; "auto" is that on a TPU, and blocks wherever else dense
        heads take more than `MAX_DENSE_SHARE` of `memory_bytes`, or than `MAX_DENSE_BYTES`.
      platform: of the devices, such as "cpu" or "tpu".
      logit_bytes: what dense heads would take on one device.
      memory_bytes: of one device; None where it is not known, or not its own.
      block_size: of `BlockHeads`.

    Raises:
      ValueError: kernels for another platform than a TPU.
    """
    if heads == "auto":
        most = MAX_DENSE_SHARE * memory_bytes if memory_bytes else MAX_DENSE_BYTES
        heads = "pallas" if platform == "tpu" else "blocks" if logit_bytes > most else "dense"
    if heads == "pallas" and platform != "tpu":
        raise ValueError(f"heads='pallas' needs a TPU, not {platform}; use 'auto' or 'blocks'")
    return DenseHeads() if heads == "dense" else BlockHeads(block_size, heads == "pallas")


def _prototypes(head: Head) -> Prototypes:
    """The last layer's parameters, as they are stored, and their norms."""
    weight_v, weight_g = (head.params["last_layer"][name] for name in ("weight_v", "weight_g"))
    return Prototypes(weight_v, weight_g, row_norms(weight_v), jnp.dtype(head.module.dtype))


def _group_mean_weights(is_real: Array) -> Array:
    """Weights of rows `[s, ...]` in a mean of group means.

    The reference averages over the rows of a GPU, then over GPUs.
    """
    real = is_real.astype(jnp.float32)
    per_group = real.sum(axis=tuple(range(1, real.ndim)), keepdims=True)
    return real / jnp.maximum(per_group, 1.0)
