"""The five schedules, evaluated on the host in float64 and handed to the step as scalars.

Outside jit they are exact to the reference at every step; inside, float32 would not be. Behaviour
follows `CosineScheduler` of dinov2/utils/utils.py and `build_schedulers` of dinov2/train/train.py
(Apache-2.0). Step 0 is the first update.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np


class Hyperparameters(NamedTuple):
    """What changes from step to step: scalars, traced by the step."""

    learning_rate: np.floating
    last_layer_learning_rate: np.floating  # of the heads' prototypes: 0 while they are frozen
    weight_decay: np.floating
    teacher_momentum: np.floating
    teacher_temp: np.floating


def warmup_cosine(
    step: int,
    *,
    start: float,
    peak: float,
    end: float,
    warmup_steps: int,
    total_steps: int,
    freeze_steps: int = 0,
) -> float:
    """Linear warm-up, then half a cosine. With W = warmup_steps and T = total_steps:

        step < freeze_steps: 0            (overrides the warm-up, does not delay it)
        step < W:            start + (peak - start) * step / (W - 1)    (W = 1: start)
        step < T:            end + (peak - end) / 2 * (1 + cos(pi * (step - W) / (T - W)))
        step >= T:           end          (also of a frozen schedule)

    The peak is reached at step W - 1 and held for one more step, as in the reference.

    Args:
      step: updates done, >= 0.
      start, peak, end: values before, between and after the two pieces.
      warmup_steps: W, from 0 to T.
      total_steps: T.
      freeze_steps: first steps at 0.

    Returns:
      The value, float64.

    Raises:
      ValueError: for a negative step, or a warm-up longer than the whole.
    """
    if step < 0:
        raise ValueError(f"{step=} must be at least 0; count updates done")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"{warmup_steps=} must be between 0 and {total_steps=}; "
            "shorten the warm-up or lengthen the run"
        )
    if step >= total_steps:
        return float(end)
    if step < freeze_steps:
        return 0.0
    if step < warmup_steps:
        # numpy's linspace, operation by operation: the last point is exact, not computed.
        if step == warmup_steps - 1 and warmup_steps > 1:
            return float(peak)
        return float(step * ((peak - start) / max(warmup_steps - 1, 1)) + start)
    position = np.pi * (step - warmup_steps) / (total_steps - warmup_steps)
    return float(end + 0.5 * (peak - end) * (1 + np.cos(position)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedules:
    """All five schedules of a run.

    Attributes:
      total_steps: updates of the whole run.
      warmup_steps: of the learning rate, from 0.
      learning_rate: its peak, after the batch-size rule.
      min_learning_rate: its value at the end.
      freeze_last_layer_steps: first updates in which the prototypes do not move.
      weight_decay_start, weight_decay_end: ends of a cosine.
      teacher_momentum_start, teacher_momentum_end: ends of a cosine.
      teacher_temp_start, teacher_temp: a line over teacher_temp_warmup_steps, then constant.
    """

    total_steps: int
    warmup_steps: int
    learning_rate: float
    min_learning_rate: float
    freeze_last_layer_steps: int
    weight_decay_start: float
    weight_decay_end: float
    teacher_momentum_start: float
    teacher_momentum_end: float
    teacher_temp_start: float
    teacher_temp: float
    teacher_temp_warmup_steps: int

    def at(self, step: int, *, dtype: type[np.floating] = np.float32) -> Hyperparameters:
        """The values for update number `step` (0-based), rounded once, to `dtype`."""
        learning_rate = {
            "start": 0.0,
            "peak": self.learning_rate,
            "end": self.min_learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }
        values = Hyperparameters(
            learning_rate=warmup_cosine(step, **learning_rate),
            last_layer_learning_rate=warmup_cosine(
                step, **learning_rate, freeze_steps=self.freeze_last_layer_steps
            ),
            weight_decay=self._cosine(step, self.weight_decay_start, self.weight_decay_end),
            teacher_momentum=self._cosine(
                step, self.teacher_momentum_start, self.teacher_momentum_end
            ),
            teacher_temp=warmup_cosine(
                step,
                start=self.teacher_temp_start,
                peak=self.teacher_temp,
                end=self.teacher_temp,
                warmup_steps=self.teacher_temp_warmup_steps,
                total_steps=self.teacher_temp_warmup_steps,
            ),
        )
        return Hyperparameters(*(dtype(value) for value in values))

    def _cosine(self, step: int, start: float, end: float) -> float:
        return warmup_cosine(
            step, start=start, peak=start, end=end, warmup_steps=0, total_steps=self.total_steps
        )


LEARNING_RATE_SCALINGS = ("sqrt_1024", "none")


def scaled_learning_rate(base: float, *, global_batch_size: int, rule: str) -> float:
    """The peak learning rate for a batch size.

    Args:
      base: `optim.base_learning_rate`.
      global_batch_size: images a step.
      rule: "sqrt_1024": base * sqrt(global_batch_size / 1024), as dinov2/utils/config.py does;
        "none": base.

    Returns:
      The peak learning rate.

    Raises:
      ValueError: for another rule.
    """
    if rule == "sqrt_1024":
        return base * math.sqrt(global_batch_size / 1024.0)
    if rule == "none":
        return base
    raise ValueError(f"learning rate scaling {rule=} must be one of {LEARNING_RATE_SCALINGS}")


def describe_learning_rate(base: float, *, global_batch_size: int, rule: str) -> str:
    """One line for the start-up table: the peak learning rate and how it came about."""
    value = scaled_learning_rate(base, global_batch_size=global_batch_size, rule=rule)
    if rule == "none":
        return f"{value:.4g} as configured, whatever the batch size"
    return f"{value:.4g} = {base:g} * sqrt({global_batch_size} images / 1024)"
