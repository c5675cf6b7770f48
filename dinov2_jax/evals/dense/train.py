"""The training of a dense head: batches in order, a file to go on from, the same bits either way.

Features are computed for each batch from new views, or read from the cache of fixed ones; what is
drawn at random depends on the seed and the number of the image in the run alone.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dinov2_jax import distributed
from dinov2_jax.convert.safetensors_file import read_safetensors, write_safetensors
from dinov2_jax.convert.state_dict import flatten, nest
from dinov2_jax.evals.dense.devices import Devices
from dinov2_jax.evals.dense.schedules import HeadSchedule
from dinov2_jax.evals.dense.train_step import (
    HeadState,
    Hyper,
    Loss,
    init_state,
    train_step,
)
from dinov2_jax.models.vit import BackboneOutput
from dinov2_jax.progress import Display
from dinov2_jax.signals import StopSignals

_STEPS_BETWEEN_LOOKS = 20
# Streams of random numbers.
ORDER, VIEW = 1, 2

Batch = tuple[list[BackboneOutput], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a head is trained.

    Attributes:
      schedule: of learning rate and b1; it has the number of steps.
      weight_decay, clip_norm: see `train_step`.
      loss: of predictions and targets.
      save_steps: steps between two writings of the file to go on from.
    """

    schedule: HeadSchedule
    weight_decay: float
    clip_norm: float | None
    loss: Loss
    save_steps: int


def train_head(
    module: Any,
    variables: Any,
    batches: Callable[[int], Iterator[Batch]],
    *,
    grid: tuple[int, int],
    training: Training,
    file: pathlib.Path,
    request: Mapping[str, Any],
    devices: Devices,
    is_shown: bool = True,
) -> Any:
    """Trains a head, or goes on where it was interrupted.

    Args:
      module: the head.
      variables: to begin with.
      batches: gives the batches from a step on: features, and targets `[b, ..]`.
      grid: rows and columns of patches in them.
      training: settings.
      file: to go on from; its folder exists.
      request: all that the result depends on, JSON: the file of another request is refused.
      devices: where features are.
      is_shown: whether progress is.

    Returns:
      The variables after the last step.

    Raises:
      ValueError: the loss is not finite; or the file is of another request.
      KeyboardInterrupt: SIGINT or SIGTERM came; everything is saved.
    """
    total = training.schedule.total_steps
    request = json.loads(json.dumps(request))
    start, state = _restore(file, request, init_state(variables))
    state = devices.copies(state)
    if start == total:
        return state.variables
    settings = dict(
        module=module,
        grid=grid,
        loss=training.loss,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
    )
    metrics = {}
    with StopSignals() as signals, Display(total=total, done=start, is_shown=is_shown) as display:
        if start:
            display.line(f"{start:,} of {total:,} steps are done: going on")
        for step, (outputs, targets) in zip(range(start, total), batches(start), strict=False):
            waited = metrics
            state, metrics = train_step(
                state, outputs, devices.rows(targets), Hyper.at(training.schedule, step), **settings
            )
            # Not more than one step ahead of the device: a signal is heeded soon.
            jax.block_until_ready(waited)
            done = step + 1
            if done % _STEPS_BETWEEN_LOOKS == 0 or done == total:
                loss = _finite_loss(metrics, done)
                display.show(done, f"loss {loss:.4g}")
            # One process of several would save alone.
            is_stopping = signals.received is not None and jax.process_count() == 1
            if done % training.save_steps == 0 or done == total or is_stopping:
                _finite_loss(metrics, done)
                _save(file, request, done, state)
            if is_stopping and done < total:
                raise KeyboardInterrupt
    return state.variables


def image_numbers(step: int, *, batch_size: int, num_images: int, seed: int) -> list[int]:
    """Which images are in the batch of a step: all of them in turn, in a new order each time."""
    numbers, orders = [], {}
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(place, num_images)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, ORDER, epoch]).permutation(num_images)
        numbers.append(int(orders[epoch][i]))
    return numbers


def view_rng(place: int, *, seed: int) -> np.random.Generator:
    """Random numbers of the view at a place of the run: step times batch, and more."""
    return np.random.default_rng([seed, VIEW, place])


def _finite_loss(metrics: Mapping[str, jax.Array], done: int) -> float:
    loss = float(metrics["loss"])
    if not np.isfinite(loss):
        raise ValueError(
            f"{loss=} must be finite, after {done} steps; lower --learning-rate, or look at the "
            "features: the network may have diverged"
        )
    return loss


def _save(file: pathlib.Path, request: Mapping[str, Any], step: int, state: HeadState) -> None:
    flat = flatten(jax.device_get(state._asdict()))
    facts = {"step": str(step), "request": json.dumps(request)}
    distributed.on_primary(lambda: write_safetensors(file, flat, facts))


def _restore(
    file: pathlib.Path, request: Mapping[str, Any], state: HeadState
) -> tuple[int, HeadState]:
    if not file.exists():
        return 0, state
    flat, facts = read_safetensors(file)
    old = json.loads(facts["request"])
    different = [
        f"{name}: {old.get(name)!r} -> {request.get(name)!r}"
        for name in sorted({*old, *request})
        if old.get(name) != request.get(name)
    ]
    if different:
        raise ValueError(
            f"{file} holds the training of another request ({'; '.join(different)}); choose "
            "another --out, or --force to begin again"
        )
    return int(facts["step"]), HeadState(**nest(flat))
