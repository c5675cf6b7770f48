"""One update of a dense head on frozen features: the same for segmentation and depth.

AdamW as PyTorch's, whose b1 may move and whose weight decay spares nothing, as in the reference's
configurations.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.evals.dense.schedules import HeadSchedule
from dinov2_jax.models.vit import BackboneOutput

B2, EPS = 0.999, 1e-8

# (predictions, targets, updates done) -> scalar
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class HeadState(NamedTuple):
    """What training changes."""

    variables: Any  # "params", and "batch_stats" of a head that has them
    mu: Any  # mean gradient, like "params"
    nu: Any  # mean squared gradient


class Hyper(NamedTuple):
    """What changes from step to step: scalars, traced by the step."""

    step: np.int32
    learning_rate: np.float32
    b1: np.float32
    mu_correction: np.float32
    nu_correction: np.float32

    @classmethod
    def at(cls, schedule: HeadSchedule, step: int) -> "Hyper":
        """The values of update number `step`, rounded once."""
        b1 = schedule.momentum(step)
        return cls(
            np.int32(step),
            np.float32(schedule.learning_rate(step)),
            np.float32(b1),
            np.float32(1 / (1 - b1 ** (step + 1))),
            np.float32(1 / (1 - B2 ** (step + 1))),
        )


def init_state(variables: Any) -> HeadState:
    """The state before the first update."""
    copied = jax.tree.map(jnp.array, variables)  # a step gives its state away
    return HeadState(copied, *(jax.tree.map(jnp.zeros_like, copied["params"]) for _ in "mn"))


@partial(
    jax.jit,
    static_argnames=("module", "grid", "loss", "weight_decay", "clip_norm"),
    donate_argnums=0,
)
def train_step(
    state: HeadState,
    outputs: Sequence[BackboneOutput],
    targets: jax.Array,
    hyper: Hyper,
    *,
    module: Any,
    grid: tuple[int, int],
    loss: Loss,
    weight_decay: float,
    clip_norm: float | None,
) -> tuple[HeadState, dict[str, jax.Array]]:
    """One update.

    Args:
      state: given away.
      outputs: of the head's layers, frozen.
      targets: what `loss` takes, `[b, ..]`.
      hyper: of this update.
      module: the head.
      grid: rows and columns of patches.
      loss: of predictions and targets.
      weight_decay: of every parameter.
      clip_norm: largest norm of all gradients together; None: none.

    Returns:
      The new state, and `loss` and `grad_norm`.
    """
    has_statistics = "batch_stats" in state.variables

    def of_params(params):
        variables = {**state.variables, "params": params}
        if not has_statistics:
            return loss(module.apply(variables, outputs, grid), targets, hyper.step), {}
        maps, updated = module.apply(variables, outputs, grid, train=True, mutable=["batch_stats"])
        return loss(maps, targets, hyper.step), updated

    params = state.variables["params"]
    (value, statistics), grads = jax.value_and_grad(of_params, has_aux=True)(params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    if clip_norm is not None:
        scale = jnp.minimum(clip_norm / (norm + 1e-6), 1)
        grads = jax.tree.map(lambda g: g * scale, grads)
    mu = jax.tree.map(lambda m, g: hyper.b1 * m + (1 - hyper.b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda n, g: B2 * n + (1 - B2) * g**2, state.nu, grads)

    def updated(p, m, n):
        step = m * hyper.mu_correction / (jnp.sqrt(n * hyper.nu_correction) + EPS)
        return p * (1 - hyper.learning_rate * weight_decay) - hyper.learning_rate * step

    variables = {"params": jax.tree.map(updated, params, mu, nu), **statistics}
    return HeadState(variables, mu, nu), {"loss": value, "grad_norm": norm}
