"""Cross-entropy of student features against unwritten targets, in blocks of prototypes.

Both passes compute a block's logits and targets from the features, use them and forget them: what
the backward pass keeps is three numbers a row. Value and gradient are those of
`linear_cross_entropy` on the whole logits.
"""

import functools
import math
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dinov2_jax.losses import cross_entropy_pallas
from dinov2_jax.losses.block_targets import TargetPrototypes, TargetRows
from dinov2_jax.losses.blocks import Layout, Prototypes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def block_cross_entropy(
    layout: Layout,
    assign: Callable[[Array], Array] | None,
    features: Array,
    prototypes: Prototypes,
    target_rows: TargetRows,
    target_prototypes: TargetPrototypes,
    temps: tuple[ArrayLike, ArrayLike],
) -> tuple[Array, Array]:
    """-sum_k targets * log_softmax(logits / student_temp), and the softmax's entropy, row by row.

    Args:
      layout: from `choose_layout`.
      assign: teacher probabilities `[..., k]` of a block to the student rows' targets `[..., k]`:
        linear, prototype by prototype, and within the groups of the leading axis. None: each
        student row has the target of the same row.
      features: of the student's head `[..., d]`.
      prototypes: the student's; gradients flow to them, through their norms too, and to the
        features, and nowhere else.
      target_rows, target_prototypes: from `block_targets`.
      temps: of student and teacher, > 0.

    Returns:
      Cross-entropy `[...]` and entropy `[...]` in nats (without gradient), float32.
    """
    return _forward(layout, assign, features, prototypes, target_rows, target_prototypes, temps)[0]


@flax.struct.dataclass
class _RowSums:
    """Running sums over prototypes, for x = logits / temp less the largest x so far, `[...]`."""

    row_max: Array
    exp_sum: Array  # sum(exp(x))
    exp_x_sum: Array  # sum(exp(x) * x)
    mass: Array  # sum(targets)
    target_x_sum: Array  # sum(targets * x)

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "_RowSums":
        zeros = jnp.zeros(shape)
        # Finite: an infinite shift would make 0 * inf of the empty sums.
        return cls(jnp.full(shape, -1e30), zeros, zeros, zeros, zeros)

    def shifted_to(self, row_max: Array) -> "_RowSums":
        shift = self.row_max - row_max  # <= 0
        scale = jnp.exp(shift)
        return self.replace(
            row_max=row_max,
            exp_sum=scale * self.exp_sum,
            exp_x_sum=scale * (self.exp_x_sum + shift * self.exp_sum),
            target_x_sum=self.target_x_sum + shift * self.mass,
        )

    def plus(self, z: Array, targets: Array) -> "_RowSums":
        """With a block's `z = logits / temp` and targets, `[..., k]` each."""
        sums = self.shifted_to(jnp.maximum(self.row_max, z.max(axis=-1)))
        x = z - sums.row_max[..., None]
        exp_x = jnp.exp(x)
        return sums.replace(
            exp_sum=sums.exp_sum + exp_x.sum(axis=-1),
            exp_x_sum=sums.exp_x_sum + (exp_x * x).sum(axis=-1),
            mass=sums.mass + targets.sum(axis=-1),
            target_x_sum=sums.target_x_sum + (targets * x).sum(axis=-1),
        )

    def over_devices(self, layout: Layout) -> "_RowSums":
        sums = self.shifted_to(layout.max_prototypes(self.row_max))
        return layout.sum_prototypes(sums.replace(row_max=None)).replace(row_max=sums.row_max)


@jax.named_scope("prototypes")
def _forward(layout, assign, features, prototypes, target_rows, target_prototypes, temps):
    def run(rows, shared, temps):
        features, target_rows = rows
        sum_rows = _sums_by_kernel if _has_kernel(layout, assign, features) else _sums_by_blocks
        sums = sum_rows(layout, assign, features, *shared, target_rows, temps).over_devices(layout)
        log_sum = jnp.log(sums.exp_sum)
        value = sums.mass * log_sum - sums.target_x_sum
        entropy = log_sum - sums.exp_x_sum / sums.exp_sum
        return (value, entropy, (sums.row_max, log_sum, sums.mass)), None, ()

    (value, entropy, kept), _, _ = layout.run(
        run, (features, target_rows), (prototypes, target_prototypes), temps
    )
    inputs = features, prototypes, target_rows, target_prototypes, temps
    return (value, entropy), (inputs, kept)


def _has_kernel(layout: Layout, assign: Callable | None, features: Array) -> bool:
    """Kernels know only targets of the same rows, and few enough of them."""
    num_rows, width = math.prod(features.shape[:-1]), features.shape[-1]
    return layout.has_kernels and assign is None and cross_entropy_pallas.fits(num_rows, width)


def _sums_by_blocks(layout, assign, features, prototypes, targets, target_rows, temps) -> _RowSums:
    def step(sums, block):
        prototypes, targets = block
        probs = jnp.exp(targets.log_probs(target_rows, temps[1]))
        probs = assign(probs) if assign else probs
        return sums.plus(prototypes.logits(features) / temps[0], probs), None

    start = _RowSums.zeros(features.shape[:-1])
    return layout.visit(step, start, (prototypes, targets))[0]


def _sums_by_kernel(layout, assign, features, prototypes, targets, target_rows, temps) -> _RowSums:
    sums = cross_entropy_pallas.row_sums(*_flat(features, prototypes, targets, target_rows, temps))
    return _RowSums(*(x.reshape(features.shape[:-1]) for x in sums))


def _flat(features, prototypes, targets, target_rows, temps):
    """The first arguments of the kernels: rows are one axis, products in the compute type."""
    teacher = targets.prototypes
    width = features.shape[-1]
    return (
        features.reshape(-1, width).astype(prototypes.dtype),
        (prototypes.weight_v, prototypes.scale),
        target_rows.features.reshape(-1, width).astype(teacher.dtype),
        (teacher.weight_v, teacher.scale),
        (target_rows.row_max.reshape(-1), target_rows.log_sum.reshape(-1)),
        targets.log_scale,
        targets.lowest(temps[1]),
        temps,
    )


@jax.named_scope("prototypes")
def _backward(layout, assign, residuals, cotangents):
    (features, prototypes, target_rows, target_prototypes, temps), kept = residuals

    def run(rows, shared, temps):
        features, *_ = rows
        by_kernel = _has_kernel(layout, assign, features)
        differentiate = _gradients_by_kernel if by_kernel else _gradients_by_blocks
        grad_features, grads = differentiate(layout, assign, *rows, *shared, temps)
        return layout.sum_prototypes(grad_features), layout.sum_rows(grads), ()

    rows = features, target_rows, kept, cotangents[0]
    grad_features, grads, _ = layout.run(run, rows, (prototypes, target_prototypes), temps)
    grad_prototypes = prototypes.replace(weight_v=grads[0], weight_g=grads[1], norms=None)
    return grad_features.astype(features.dtype), grad_prototypes, None, None, None


def _gradients_by_blocks(
    layout, assign, features, target_rows, kept, cotangent, prototypes, targets, temps
):
    row_max, log_sum, mass = kept
    z = features.astype(prototypes.dtype)

    def step(grad_features, block):
        prototypes, targets = block
        weight = prototypes.weight
        probs = jnp.exp(targets.log_probs(target_rows, temps[1]))
        probs = assign(probs) if assign else probs
        x = prototypes.logits(features) / temps[0] - row_max[..., None]
        softmax = jnp.exp(x - log_sum[..., None])
        slope = mass[..., None] * softmax - probs  # [..., k]
        slope = (cotangent / temps[0])[..., None] * slope
        grad_weight = jnp.einsum(
            "nk,nd->kd",
            slope.reshape(-1, slope.shape[-1]),
            z.reshape(-1, z.shape[-1]),
            preferred_element_type=jnp.float32,
        )
        grad_features += jnp.einsum(
            "...k,kd->...d", slope, weight, preferred_element_type=jnp.float32
        )
        return grad_features, prototypes.to_parameters(grad_weight)

    return layout.visit(step, jnp.zeros(features.shape), (prototypes, targets))


def _gradients_by_kernel(
    layout, assign, features, target_rows, kept, cotangent, prototypes, targets, temps
):
    row_max, log_sum, mass = (x.reshape(-1) for x in kept)
    grad_features, grads = cross_entropy_pallas.gradients(
        *_flat(features, prototypes, targets, target_rows, temps),
        norms=prototypes.norms,
        log_sum=row_max + log_sum,
        mass=mass,
        cotangent=cotangent.reshape(-1),
    )
    return grad_features.reshape(features.shape), grads


block_cross_entropy.defvjp(_forward, _backward)
