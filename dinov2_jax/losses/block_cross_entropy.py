"""Cross-entropy of student features against unwritten targets, in blocks of prototypes.

Both passes compute a block's logits and targets from the features, use them and forget them: what
the backward pass keeps is three numbers a row. Value and gradient are those of
`cross_entropy.cross_entropy` on the whole logits.
"""

import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dinov2_jax.losses.block_targets import TargetPrototypes, TargetRows
from dinov2_jax.losses.blocks import Layout, Prototypes
from dinov2_jax.models.heads import weight_norm


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def block_cross_entropy(
    layout: Layout,
    assign: Callable[[Array], Array],
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
        linear, prototype by prototype, and within the groups of the leading axis.
      features: of the student's head `[..., d]`.
      prototypes: the student's; gradients flow to them and to the features, and nowhere else.
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


def _forward(layout, assign, features, prototypes, target_rows, target_prototypes, temps):
    def run(rows, shared, temps):
        features, target_rows = rows

        def step(sums, block):
            prototypes, targets = block
            probs = jnp.exp(targets.log_probs(target_rows, temps[1]))
            return sums.plus(prototypes.logits(features) / temps[0], assign(probs)), None

        start = _RowSums.zeros(features.shape[:-1])
        sums = layout.visit(step, start, shared)[0].over_devices(layout)
        log_sum = jnp.log(sums.exp_sum)
        value = sums.mass * log_sum - sums.target_x_sum
        entropy = log_sum - sums.exp_x_sum / sums.exp_sum
        return (value, entropy, (sums.row_max, log_sum, sums.mass)), None, ()

    (value, entropy, kept), _, _ = layout.run(
        run, (features, target_rows), (prototypes, target_prototypes), temps
    )
    inputs = features, prototypes, target_rows, target_prototypes, temps
    return (value, entropy), (inputs, kept)


def _backward(layout, assign, residuals, cotangents):
    (features, prototypes, target_rows, target_prototypes, temps), kept = residuals

    def run(rows, shared, temps):
        features, target_rows, (row_max, log_sum, mass), cotangent = rows
        z = features.astype(prototypes.dtype)

        def step(grad_features, block):
            prototypes, targets = block
            weight, to_parameters = jax.vjp(weight_norm, prototypes.weight_v, prototypes.weight_g)
            probs = jnp.exp(targets.log_probs(target_rows, temps[1]))
            x = prototypes.logits(features) / temps[0] - row_max[..., None]
            softmax = jnp.exp(x - log_sum[..., None])
            slope = mass[..., None] * softmax - assign(probs)  # [..., k]
            slope = (cotangent / temps[0])[..., None] * slope
            grad_weight = jnp.einsum(
                "nk,nd->kd",
                slope.reshape(-1, slope.shape[-1]),
                z.reshape(-1, z.shape[-1]),
                preferred_element_type=jnp.float32,
            )
            grad_features += jnp.einsum(
                "...k,kd->...d", slope, weight.astype(z.dtype), preferred_element_type=jnp.float32
            )
            return grad_features, to_parameters(grad_weight)

        grad_features, grads = layout.visit(step, jnp.zeros(features.shape), shared)
        return layout.sum_prototypes(grad_features), layout.sum_rows(grads), ()

    rows = features, target_rows, kept, cotangents[0]
    grad_features, grads, _ = layout.run(run, rows, (prototypes, target_prototypes), temps)
    grad_prototypes = prototypes.replace(weight_v=grads[0], weight_g=grads[1])
    return grad_features.astype(features.dtype), grad_prototypes, None, None, None


block_cross_entropy.defvjp(_forward, _backward)
