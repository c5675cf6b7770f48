"""Teacher targets that are never written down: softmax_k(logits / temp + log_scale).

Both Sinkhorn-Knopp and softmax centering end in this form, so one number per prototype and two
per row say everything; whoever needs the targets of a block of prototypes computes them from the
features again. Same results as `centering`, whose docstrings are the specification: Sinkhorn's
targets are 0 below its `lowest_logit`, where the sums that they are divided by had nothing either.
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dinov2_jax.losses import sinkhorn_pallas
from dinov2_jax.losses.blocks import Layout, Prototypes
from dinov2_jax.losses.centering import LIFT, lowest_logit, move_center, prototype_floor


@flax.struct.dataclass
class TargetRows:
    """What the targets know of each row; any leading axes `...`."""

    features: Array  # [..., d], of the teacher's head
    row_max: Array  # [...], of the logits, or near it
    log_sum: Array  # [...], log of what normalises the row


@flax.struct.dataclass
class TargetPrototypes:
    """What the targets know of each prototype, or of each of a block."""

    prototypes: Prototypes  # the teacher's
    log_scale: Array  # [k]
    # Whether a target below this is 0, as it was in Sinkhorn-Knopp's sums.
    has_lowest: bool = flax.struct.field(pytree_node=False, default=False)

    def lowest(self, temp: ArrayLike) -> ArrayLike:
        """How far below its row's maximum, as a negative number, a logit has a target."""
        return lowest_logit(temp) if self.has_lowest else -jnp.inf

    def log_probs(self, rows: TargetRows, temp: ArrayLike) -> Array:
        """Log of the targets, `[..., k]`; finite, as entropies multiply it with targets of 0."""
        shifted = self.prototypes.logits(rows.features) - rows.row_max[..., None]
        log_probs = shifted / temp + self.log_scale - rows.log_sum[..., None]
        return jnp.where(shifted < self.lowest(temp), -1e30, log_probs)


def sinkhorn_knopp(
    features: Array,
    prototypes: Prototypes,
    temp: ArrayLike,
    *,
    is_real: Array,
    num_iters: int,
    layout: Layout,
) -> tuple[TargetRows, TargetPrototypes]:
    """`centering.sinkhorn_knopp` in blocks: a pass for the rows' maxima, one or two an iteration.

    One pass sums over the rows, for the prototypes' u, and over the prototypes times u. On several
    devices every block would wait there for a sum over them: then they are two passes.

    Args:
      features: of the teacher's head, `[..., d]`.
      prototypes: the teacher's.
      temp: teacher temperature, > 0.
      is_real: bool `[...]`, False for padding.
      num_iters: >= 1.
      layout: from `choose_layout`.
    """
    if num_iters < 1:
        raise ValueError(f"{num_iters=} must be at least 1; use 3 as the reference does")
    smallest = jnp.finfo(jnp.float32).tiny
    num_prototypes = prototypes.weight_v.shape[0]

    def run(rows, prototypes, temp):
        z, is_real = rows[0].reshape(-1, features.shape[-1]), rows[1].reshape(-1)
        matrix = _Matrix(z, prototypes, temp, layout)
        share = jnp.maximum(layout.sum_rows(is_real.sum()), 1) / num_prototypes
        floor = prototype_floor(share)
        shift = layout.max_rows(jnp.where(is_real, matrix.row_max, -jnp.inf).max())

        def iterate(_, state):
            def to_u(per_prototype):
                return share / jnp.maximum(per_prototype, floor)

            if layout.has_kernels or layout.cuts_rows:
                u = to_u(layout.sum_rows(matrix.sum_rows(state[0])))
                per_row = matrix.sum_prototypes(u)
            else:
                u, per_row = matrix.sum_both(state[0], to_u)
            per_row = layout.sum_prototypes(per_row)
            per_row = jnp.maximum(per_row, smallest)
            return jnp.where(is_real, 1.0 / per_row, 0.0), per_row, u

        v = jnp.where(is_real, LIFT * jnp.exp((matrix.row_max - shift) / temp), 0.0)
        start = v, v, jnp.zeros(prototypes.weight_v.shape[0])
        _, per_row, u = jax.lax.fori_loop(0, num_iters, iterate, start)
        shape = rows[1].shape
        # Both are lifted, for logarithms nearer to 0: where that cancels, fewer bits do.
        vectors = matrix.row_max.reshape(shape), jnp.log(LIFT * per_row).reshape(shape)
        return vectors, jnp.log(LIFT * u), ()

    (row_max, log_sum), log_u, _ = layout.run(run, (features, is_real), prototypes, temp)
    return TargetRows(features, row_max, log_sum), TargetPrototypes(prototypes, log_u, True)


class _Matrix:
    """exp((logits - row_max) / temp) `[n, k]`, 0 below `lowest_logit`; it is never written down."""

    def __init__(self, z: Array, prototypes: Prototypes, temp: ArrayLike, layout: Layout):
        self._prototypes, self._temp, self._layout = prototypes, temp, layout
        self._z, self._has_kernels = z, layout.has_kernels
        if self._has_kernels:
            self._z = z.astype(prototypes.dtype)
            self._pair = prototypes.weight_v, prototypes.scale
            own_max = sinkhorn_pallas.largest_logits(self._z, self._pair)
        else:
            start = jnp.full(z.shape[0], -jnp.inf)
            own_max, _ = layout.visit(
                lambda row_max, block: (jnp.maximum(row_max, block.logits(z).max(axis=-1)), None),
                start,
                prototypes,
            )
        self.row_max = layout.max_prototypes(own_max)  # [n]

    def _of(self, block: Prototypes) -> Array:
        shifted = block.logits(self._z) - self.row_max[:, None]
        return jnp.where(shifted < lowest_logit(self._temp), 0.0, jnp.exp(shifted / self._temp))

    def sum_rows(self, v: Array) -> Array:
        """Rows times `v [n]`, summed over those of this device: `[k]`."""
        if self._has_kernels:
            return sinkhorn_pallas.sum_rows(self._z, self._pair, self.row_max, v, self._temp)
        highest = jax.lax.Precision.HIGHEST
        _, sums = self._layout.visit(
            lambda _, block: (None, jnp.einsum("nk,n->k", self._of(block), v, precision=highest)),
            None,
            self._prototypes,
        )
        return sums

    def sum_prototypes(self, u: Array) -> Array:
        """Prototypes times `u [k]`, summed over those of this device: `[n]`."""
        if self._has_kernels:
            return sinkhorn_pallas.sum_prototypes(self._z, self._pair, self.row_max, u, self._temp)

        def step(sums, block):
            prototypes, u = block
            highest = jax.lax.Precision.HIGHEST
            return sums + jnp.einsum("nk,k->n", self._of(prototypes), u, precision=highest), None

        sums, _ = self._layout.visit(step, jnp.zeros_like(self.row_max), (self._prototypes, u))
        return sums

    def sum_both(self, v: Array, to_u: Callable[[Array], Array]) -> tuple[Array, Array]:
        """`u = to_u(sum_rows(v))` and `sum_prototypes(u)` in one pass."""
        highest = jax.lax.Precision.HIGHEST

        def step(sums, block):
            block = self._of(block)
            u = to_u(jnp.einsum("nk,n->k", block, v, precision=highest))
            return sums + jnp.einsum("nk,k->n", block, u, precision=highest), u

        sums, u = self._layout.visit(step, jnp.zeros_like(self.row_max), self._prototypes)
        return u, sums


def softmax_center(
    features: Array, prototypes: Prototypes, center: Array, temp: ArrayLike, *, layout: Layout
) -> tuple[TargetRows, TargetPrototypes]:
    """`centering.softmax_center` in blocks: one visit, with a running maximum and sum."""

    def run(features, prototypes, temp):
        def step(state, block):
            logits = block[0].logits(features) - block[1]
            old_max, total = state
            row_max = jnp.maximum(old_max, logits.max(axis=-1))
            total = total * jnp.exp((old_max - row_max) / temp)
            return (row_max, total + jnp.exp((logits - row_max[..., None]) / temp).sum(-1)), None

        shape = features.shape[:-1]
        start = jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape)
        (own_max, total), _ = layout.visit(step, start, prototypes)
        row_max = layout.max_prototypes(own_max)
        total = layout.sum_prototypes(total * jnp.exp((own_max - row_max) / temp))
        return (row_max, jnp.log(total)), None, ()

    (row_max, log_sum), _, _ = layout.run(run, features, (prototypes, center), temp)
    return TargetRows(features, row_max, log_sum), TargetPrototypes(prototypes, -center / temp)


def update_center(
    center: Array,
    features: Array,
    prototypes: Prototypes,
    *,
    momentum: float,
    row_weights: Array,
    layout: Layout,
) -> Array:
    """`centering.update_center` in blocks: the mean of the logits is the logit of the mean."""

    def run(rows, prototypes, _):
        features, weights = rows
        # As the logits' products see them, but summed in float32.
        z = features.astype(prototypes.dtype).astype(jnp.float32).reshape(-1, features.shape[-1])
        weights = weights.reshape(-1)
        weighted_sum = jnp.einsum("n,nd->d", weights, z, precision=jax.lax.Precision.HIGHEST)
        total, weighted_sum = layout.sum_rows((weights.sum(), weighted_sum))
        mean = weighted_sum / jnp.where(total > 0, total, 1.0)
        _, logits = layout.visit(lambda _, block: (None, block.mean_logits(mean)), None, prototypes)
        return None, logits, total

    _, mean, total = layout.run(run, (features, row_weights), prototypes)
    return move_center(center, mean, total, momentum=momentum)


def target_statistics(
    rows: TargetRows, shared: TargetPrototypes, temp: ArrayLike, *, layout: Layout
) -> tuple[Array, Array]:
    """The entropy of each row in nats `[...]`, and its most likely prototype, int32 `[...]`."""

    def run(rows, shared, temp):
        num_local = shared.log_scale.shape[0]
        first = layout.first_prototype(num_local)

        def step(state, block):
            entropy, best, best_index, first = state
            log_probs = block.log_probs(rows, temp)
            entropy -= (jnp.exp(log_probs) * log_probs).sum(axis=-1)
            highest = log_probs.max(axis=-1)
            index = first + log_probs.argmax(axis=-1)
            best_index = jnp.where(highest > best, index, best_index)  # the first of equals
            return (
                entropy,
                jnp.maximum(best, highest),
                best_index,
                first + log_probs.shape[-1],
            ), None

        zeros = jnp.zeros_like(rows.row_max)
        start = zeros, jnp.full_like(zeros, -jnp.inf), zeros.astype(jnp.int32), jnp.int32(first)
        (entropy, best, best_index, _), _ = layout.visit(step, start, shared)
        is_best = best == layout.max_prototypes(best)
        # The smallest index among the devices that hold the best.
        candidate = jnp.where(is_best, -best_index, jnp.iinfo(jnp.int32).min)
        return (layout.sum_prototypes(entropy), -layout.max_prototypes(candidate)), None, ()

    (entropy, best_index), _, _ = layout.run(run, rows, shared, temp)
    return entropy, best_index
