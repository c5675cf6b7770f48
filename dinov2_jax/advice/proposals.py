"""Values that fit the size of a run, for the keys that decide whether it learns.

`RunSettings` come in, `Suggestion`s go out: key, value and the reason with its numbers. The end of
a schedule follows the start that is proposed; nothing else follows another proposal, so that none
is left once they are applied.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from dinov2_jax.advice import scale
from dinov2_jax.advice.settings import RunSettings

# Judgement: a setting within this factor of what fits is left as it is.
NEAR_PROTOTYPES = 2
NEAR_MOMENTUM = 2  # of 1 - momentum
NO_MOMENTUM_GAP = 0.002  # at the end of a run as good as 0
NEAR_LEARNING_RATE = 2
NEAR_LEARNING_RATE_END = 3
RISES = 1.1  # times the peak, a rate at the end; a flat one that is rounded does not
NO_LEARNING_RATE = 0.01  # of the peak: at the end of a run as good as 0
NEAR_WARMUP = 2
NEAR_TEACHER_TEMP = 1.5  # 2 times took twice as many images, docs/learning.md
LOWEST_CENTERED_TEMP = 0.7  # of what fits, with softmax centering
NEAR_LAYER_SCALE = 10
NEAR_KOLEO = 3
NEAR_GROUP_SIZE = 3


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A value for a key.

    Attributes:
      key: dotted, of configs/base.py.
      value: proposed; equal to `current` where that fits.
      current: as configured.
      reason: one short line, with the numbers.
    """

    key: str
    value: float | int
    current: float | int
    reason: str

    @property
    def is_change(self) -> bool:
        return self.value != self.current


def suggest(run: RunSettings) -> tuple[Suggestion, ...]:
    """A suggestion for every key that matters in this run, changes and confirmations alike."""
    return (
        *_prototypes(run),
        *_momentum(run),
        *_learning_rate(run),
        _warmup(run),
        *_teacher_temps(run),
        _layer_scale(run),
        _group_size(run),
        _koleo(run),
    )


def is_near(current: float, value: float, factor: float) -> bool:
    """Whether a value is left as it is, where `value` fits."""
    return current > 0 and max(current / value, value / current) <= factor


def _round_digits(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def fitting_prototypes(run: RunSettings, key: str) -> int:
    """K for all rows that meet it, a power of two; see `RunSettings.rows`."""
    fits = []
    for (met, kind), rows in run.rows.items():
        if met == key:
            line = scale.PROTOTYPES[kind]
            # Not many more than images: each would get a prototype of its own.
            fits.append(min(line.at(rows), max(run.num_images, line.small[1])))
    return 2 ** round(math.log2(min(fits)))


def _prototypes(run: RunSettings) -> Iterator[Suggestion]:
    for key, current in run.prototypes.items():
        fitting = fitting_prototypes(run, key)
        rows = {kind: rows for (met, kind), rows in run.rows.items() if met == key}
        counts = " and ".join(f"{count:,.0f} {kind}" for kind, count in rows.items())
        reason = f"a step has {counts} of {run.num_images:,} images for {current:,} prototypes"
        fewest = min(rows.values())
        if run.centering == "sinkhorn_knopp" and current > fewest:
            reason += f"; Sinkhorn spreads a target over {current / fewest:,.0f} or more"
        value = current if is_near(current, fitting, NEAR_PROTOTYPES) else fitting
        yield Suggestion(key, value, current, reason)


def _momentum(run: RunSettings) -> Iterator[Suggestion]:
    current, fitting = run.momentum_start, scale.fitting_momentum(run.total_steps)
    left = scale.initialisation_left(current, run.momentum_end, total_steps=run.total_steps)
    start = current if is_near(1 - current, 1 - fitting, NEAR_MOMENTUM) else fitting
    yield Suggestion(
        "teacher.momentum_start",
        start,
        current,
        f"an average over {1 / (1 - fitting):,.0f} steps fits {run.total_steps:,}; with "
        f"{current:g} the last teacher is {left:.0%} initialisation",
    )
    current = run.momentum_end
    # It never falls.
    gap = min(scale.MOMENTUM_END_GAP.at(run.total_steps), 1 - start)
    floor = NO_MOMENTUM_GAP
    near = is_near(1 - current + floor, gap + floor, NEAR_MOMENTUM)
    yield Suggestion(
        "teacher.momentum_end",
        current if near else round(1 - gap, 4),
        current,
        _end_reason(run, "momentum towards 1"),
    )


def _end_reason(run: RunSettings, what: str) -> str:
    (short, _), (long, _) = scale.LEARNING_RATE_END.small, scale.LEARNING_RATE_END.large
    return (
        f"a {what} ends a run of {long:,} steps and more; up to {short:,} a level one goes on "
        f"learning; these are {run.total_steps:,}"
    )


def _learning_rate(run: RunSettings) -> Iterator[Suggestion]:
    current, factor = run.base_learning_rate, run.learning_rate_factor
    if run.layerwise_lr_decay < 1:
        # Most layers then learn at a fraction of the peak, and nothing was measured.
        base = current
        reason = f"no proposal beside optim.layerwise_lr_decay={run.layerwise_lr_decay:g}"
    else:
        fitting = fitting_base(run)
        base = current if is_near(current, fitting, NEAR_LEARNING_RATE) else fitting
        reason = (
            f"batch {run.global_batch_size:,}, width {run.embed_dim:,} and {run.total_steps:,} "
            f"steps fit a peak of {fitting * factor:.2g}; {current:g} gives {current * factor:.2g}"
        )
    yield Suggestion("optim.base_learning_rate", base, current, reason)
    current, peak = run.min_learning_rate, base * factor
    share = scale.LEARNING_RATE_END.at(run.total_steps)
    floor = NO_LEARNING_RATE
    near = is_near(max(current / peak, floor), max(share, floor), NEAR_LEARNING_RATE_END)
    yield Suggestion(
        "optim.min_learning_rate",
        current if near and current <= RISES * peak else _round_digits(share * peak, 2),
        current,
        _end_reason(run, "rate towards 0"),
    )


def fitting_base(run: RunSettings) -> float:
    """The base learning rate, to two digits; see `scale.fitting_learning_rate`."""
    peak = scale.fitting_learning_rate(
        global_batch_size=run.global_batch_size,
        embed_dim=run.embed_dim,
        total_steps=run.total_steps,
    )
    return _round_digits(peak / run.learning_rate_factor, 2)


def fitting_warmup_steps(total_steps: int) -> int:
    """Steps of the learning rate's warm-up, at least 1."""
    return max(1, round(scale.WARMUP_SHARE.at(total_steps) * total_steps))


def _warmup(run: RunSettings) -> Suggestion:
    current, fitting = run.warmup_steps, fitting_warmup_steps(run.total_steps)
    return Suggestion(
        "optim.warmup_steps",
        current if is_near(current, fitting, NEAR_WARMUP) else fitting,
        current,
        f"{fitting / run.total_steps:.0%} of {run.total_steps:,} steps fit; {current:,} are "
        f"{current / run.total_steps:.0%}",
    )


def _teacher_temps(run: RunSettings) -> Iterator[Suggestion]:
    end = _teacher_temp(
        run, "centering.teacher_temp", run.teacher_temp, scale.TEACHER_TEMP, highest=math.inf
    )
    yield _teacher_temp(
        run,
        "centering.teacher_temp_start",
        run.teacher_temp_start,
        scale.TEACHER_TEMP_START,
        highest=end.value,  # it never falls
    )
    yield end


def _teacher_temp(
    run: RunSettings,
    key: str,
    current: float,
    lines: Mapping[str, scale.Line],
    *,
    highest: float,
) -> Suggestion:
    line = lines[run.centering]
    fitting = _round_digits(line.at(run.total_steps), 2)
    near = is_near(current, fitting, NEAR_TEACHER_TEMP) and not is_too_low(run, current, fitting)
    (short, low), (long, high) = line.small, line.large
    return Suggestion(
        key,
        min(current if near else fitting, highest),
        current,
        f"targets must be sharp to teach in few steps: {low:g} fits up to {short:,}, "
        f"{high:g} from {long:,} on; these are {run.total_steps:,}",
    )


def is_too_low(run: RunSettings, temp: float, fitting: float) -> bool:
    """Whether a temperature leaves softmax centering a few prototypes that take all images."""
    return run.centering == "softmax_center" and temp < LOWEST_CENTERED_TEMP * fitting


def _layer_scale(run: RunSettings) -> Suggestion:
    current, fitting = run.layer_scale_init, _round_digits(scale.LAYER_SCALE.at(run.total_steps), 1)
    return Suggestion(
        "model.layer_scale_init",
        current if is_near(current, fitting, NEAR_LAYER_SCALE) else fitting,
        current,
        f"blocks begin at this share of their output, and {run.total_steps:,} steps must grow it",
    )


def fitting_group_size(run: RunSettings) -> int:
    """The size nearest to what fits that divides the batch, and of whose crops one is masked."""
    piece = run.global_batch_size // run.num_batch_pieces
    sizes = [
        size
        for size in range(min(piece, 2), piece + 1)  # one image has no neighbours
        if piece % size == 0 and (not run.ibot_weight or int(2 * size * run.mask_probability) >= 1)
    ]
    aim = scale.GROUP_SIZE.at(run.global_batch_size)
    return min(sizes, key=lambda size: abs(math.log(size / aim)), default=run.group_size)


def _koleo(run: RunSettings) -> Suggestion:
    current, group = run.koleo_weight, _group_size(run).value
    fitting = scale.KOLEO_WEIGHT if group > 1 else 0.0
    return Suggestion(
        "koleo.loss_weight",
        current if fitting and is_near(current, fitting, NEAR_KOLEO) else fitting,
        current,
        f"it spreads the class tokens of a group, here {group:,}, over more dimensions: "
        f"{scale.KOLEO_WEIGHT:g} fits at every size that was tried",
    )


def _group_size(run: RunSettings) -> Suggestion:
    current, fitting = run.group_size, fitting_group_size(run)
    piece = run.global_batch_size // run.num_batch_pieces
    return Suggestion(
        "group_size",
        # In a group of one KoLeo has no neighbours.
        current if current > 1 and is_near(current, fitting, NEAR_GROUP_SIZE) else fitting,
        current,
        f"masks, KoLeo and drop path see their group alone; of the {piece:,} images of a batch "
        f"shard {fitting:,} fit",
    )
