"""One training step: targets, gradients, update, EMA. Built once, then jitted and donated.

Behaviour follows dinov2/train/ssl_meta_arch.py and train.py. Randomness: drop path alone, keyed by
(seed, step). Schedules stay on the host, which passes their values in (`optim.schedules`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from dinov2_jax.losses import diagnostics
from dinov2_jax.objective import (
    LossSettings,
    Metrics,
    Views,
    make_views,
    student_loss,
    teacher_rows,
    teacher_targets,
)
from dinov2_jax.optim.optimizer import module_norms
from dinov2_jax.optim.schedules import Hyperparameters
from dinov2_jax.train_state import Network, Params, TrainState


def split_groups(tree, num_micro_batches: int):
    """Cuts the leading group axis into micro-batches: [s, ...] -> [a, s / a, ...].

    Groups go to micro-batches in turn: each device keeps its own, if it has as many of each.
    """
    return jax.tree.map(lambda x: rearrange(x, "(p a) ... -> a p ...", a=num_micro_batches), tree)


def join_groups(tree):
    """The inverse of `split_groups`."""
    return jax.tree.map(lambda x: rearrange(x, "a p ... -> (p a) ..."), tree)


def mean_over_micro_batches(function: Callable, inputs, num_micro_batches: int):
    """Mean of `function(micro_batch, index)` over the micro-batches, one at a time.

    Every loss term is a mean over groups, so the mean over micro-batches of equally many groups
    is the value (and the gradient) of the whole batch.
    """
    if num_micro_batches == 1:
        return function(inputs, 0)

    def body(total, step_inputs):
        value = function(*step_inputs)
        return jax.tree.map(jnp.add, total, value), None

    pieces = (split_groups(inputs, num_micro_batches), jnp.arange(num_micro_batches))
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, pieces)
    return jax.tree.map(lambda x: x / num_micro_batches, total)


def update_teacher(teacher: Params, student: Params, momentum: jax.Array) -> Params:
    """The EMA in f32: `teacher <- momentum * teacher + (1 - momentum) * student`."""
    return jax.tree.map(lambda t, s: momentum * t + (1.0 - momentum) * s, teacher, student)


def make_train_step(
    *,
    network: Network,
    optimizer: optax.GradientTransformationExtraArgs,
    losses: LossSettings,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    seed: int,
    num_micro_batches: int = 1,
) -> Callable[[TrainState, dict[str, jax.Array], Hyperparameters], tuple[TrainState, Metrics]]:
    """Builds the step `(state, batch, hyperparameters) -> (state, metrics)`, ready for `jax.jit`.

    A step whose loss, gradients or updates are not finite changes nothing but `state.step`; its
    metric `nonfinite` is 1. Metrics describe the state before the update.

    Args:
      network, optimizer: see `train_state.Network` and `optim.optimizer.make_optimizer`.
      losses: weights and constants.
      augment: uint8 crops and their parameters -> normalised crops; see `dinov2_jax.augment`.
      seed: of drop path; the key of a step is folded from it and `state.step`.
      num_micro_batches: student passes a step; see `configs/base.py`, grad_accumulation_steps.
    """

    def look_at(teacher: Params, views: Views):
        run = functools.partial(teacher_rows, teacher, network=network, losses=losses)
        if num_micro_batches == 1:
            return run(views)
        return join_groups(jax.lax.map(run, split_groups(views, num_micro_batches)))

    def train_step(state: TrainState, batch: dict[str, jax.Array], hyper: Hyperparameters):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        with jax.named_scope("augment"):
            views = make_views(batch, augment=augment)
        with jax.named_scope("teacher"):
            cls, rows = look_at(state.teacher, views)
        with jax.named_scope("targets"):
            targets, centers, watch = teacher_targets(
                state.teacher,
                rows,
                state.centers,
                views.mask_weights,
                teacher_temp=hyper.teacher_temp,
                network=network,
                losses=losses,
            )

        def gradients(inputs, index):
            views, target_rows = inputs
            (_, terms), grads = jax.value_and_grad(student_loss, has_aux=True)(
                state.student,
                views,
                targets.replace(rows=target_rows),
                jax.random.fold_in(key, index),
                network=network,
                losses=losses,
            )
            return terms, grads

        with jax.named_scope("student"):
            terms, grads = mean_over_micro_batches(
                gradients, (views, targets.rows), num_micro_batches
            )
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.student, hyperparameters=hyper
            )
            student = optax.apply_updates(state.student, updates)
        with jax.named_scope("ema"):
            teacher = update_teacher(state.teacher, student, hyper.teacher_momentum)

        norms = {f"grad_norm/{name}": norm for name, norm in module_norms(grads).items()}
        checked = (terms["total_loss"], *norms.values(), optax.tree.norm(updates))
        finite = jnp.isfinite(sum(checked))
        learned = state.replace(
            student=student, teacher=teacher, opt_state=opt_state, centers=centers
        )
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), learned, state)
        nonfinite = 1 - finite.astype(jnp.int32)
        features = diagnostics.feature_metrics(cls)
        metrics = {**terms, **watch, **features, **norms, "nonfinite": nonfinite}
        return state.replace(step=state.step + 1), metrics

    return train_step
