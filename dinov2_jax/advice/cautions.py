"""Configurations that can start, and cannot learn or almost surely do not: a line for each.

What cannot even start is an error of `config_rules.py`. Each line names key and value, the rule
and the cure.
"""

import math
from collections.abc import Iterator

from dinov2_jax.advice import scale
from dinov2_jax.advice.proposals import (
    NEAR_LEARNING_RATE,
    NEAR_WARMUP,
    RISES,
    fitting_base,
    fitting_group_size,
    fitting_prototypes,
    fitting_warmup_steps,
    is_near,
    is_too_low,
)
from dinov2_jax.advice.settings import RunSettings

# Judgement, all of it; no shipped recipe comes near.
PROTOTYPES_TOO_MANY = 4  # times what fits, if it is also above the paper's 21 for each row
PAPERS_SPREAD = 131_072 / 6_144
LAYER_SCALE_TOO_SMALL = 1_000  # times below what fits
MOST_OF_THE_RUN = 0.5  # in warm-up, or with frozen prototypes
MOST_OF_THE_TEACHER = 0.5  # is its initialisation at the end
COPIES_IN_A_STEP = 2  # of each image
FEWEST_LOCAL_PATCHES = 4  # of a crop
TEMP_TOO_HIGH = 2.5  # times what fits; 2 times took twice as many images, docs/learning.md
RATE_TOO_HIGH = 5  # times what fits; 30 times unlearnt what the random network knew, same page


def warnings_of(run: RunSettings) -> list[str]:
    """One line for each thing that is wrong; none for a configuration that may work."""
    return [*_of_rows(run), *_of_lengths(run), *_of_rates(run), *_of_data(run)]


def _of_rows(run: RunSettings) -> Iterator[str]:
    if run.centering == "sinkhorn_knopp":
        for (key, kind), rows in run.rows.items():
            current = run.prototypes[key]
            fitting = scale.PROTOTYPES[kind].at(rows)
            if current > max(PROTOTYPES_TOO_MANY * fitting, PAPERS_SPREAD * rows):
                yield (
                    f"{key}={current} is far above the {rows:,.0f} {kind} that Sinkhorn sees in a "
                    f"step: it spreads each target over {current / rows:,.0f} prototypes or more; "
                    f"lower it to about {fitting_prototypes(run, key)}, or raise global_batch_size"
                )
    elif run.center_momentum > 1 - 1 / run.total_steps:
        yield (
            f"centering.center_momentum={run.center_momentum:g} moves the center too slowly for "
            f"total_steps={run.total_steps}: it must be at most 1 - 1 / total_steps; "
            + ("0.9 is usual" if run.total_steps >= 10 else "lower it, or train longer")
        )
    if run.koleo_weight and run.group_size == 1:
        fitting = fitting_group_size(run)
        cure = f"raise group_size to {fitting}, or set" if fitting > 1 else "set"
        yield (
            f"koleo.loss_weight={run.koleo_weight:g} does nothing with group_size=1: an image's "
            f"neighbours are those of its group; {cure} koleo.loss_weight=0"
        )


def _of_lengths(run: RunSettings) -> Iterator[str]:
    for key, steps, rule, cure in (
        (
            "optim.warmup_steps",
            run.warmup_steps,
            "the learning rate hardly reaches its peak before it falls",
            f"shorten it to about {fitting_warmup_steps(run.total_steps)}",
        ),
        (
            "optim.freeze_last_layer_steps",
            run.freeze_last_layer_steps,
            "prototypes that do not move cannot follow the features",
            "shorten it; the recipes have 0.2 to 2 %",
        ),
    ):
        share = steps / run.total_steps
        # Of a few steps one or two may be more than half, and fit.
        if share > MOST_OF_THE_RUN and steps > NEAR_WARMUP * fitting_warmup_steps(run.total_steps):
            yield f"{key}={steps} is {share:.0%} of total_steps={run.total_steps}: {rule}; {cure}"
    left = scale.initialisation_left(
        run.momentum_start, run.momentum_end, total_steps=run.total_steps
    )
    if left > MOST_OF_THE_TEACHER:
        yield (
            f"teacher.momentum_start={run.momentum_start:g} is too high for total_steps="
            f"{run.total_steps}: the last teacher would be {left:.0%} its initialisation; lower it "
            f"to about {scale.fitting_momentum(run.total_steps):g}, or train longer"
        )
    fitting = scale.TEACHER_TEMP[run.centering].at(run.total_steps)
    if is_too_low(run, run.teacher_temp, fitting):
        yield (
            f"centering.teacher_temp={run.teacher_temp:g} is too low for centering.kind="
            f"softmax_center and total_steps={run.total_steps}: a few prototypes take all images; "
            f"raise it to about {fitting:.2g}, or set centering.kind=sinkhorn_knopp"
        )
    if run.teacher_temp > TEMP_TOO_HIGH * fitting:
        yield (
            f"centering.teacher_temp={run.teacher_temp:g} is too high for total_steps="
            f"{run.total_steps}: targets stay nearly even and teach little; lower it to about "
            f"{fitting:.2g}, and centering.teacher_temp_start with it"
        )
    elif run.teacher_temp_warmup_steps:
        fitting = scale.TEACHER_TEMP_START[run.centering].at(run.total_steps)
        if run.teacher_temp_start > TEMP_TOO_HIGH * fitting:
            yield (
                f"centering.teacher_temp_start={run.teacher_temp_start:g} is too high for "
                f"total_steps={run.total_steps}: targets begin nearly even and teach little; lower "
                f"it to about {fitting:.2g}"
            )
    fitting = scale.LAYER_SCALE.at(run.total_steps)
    if run.layer_scale_init * LAYER_SCALE_TOO_SMALL < fitting:
        yield (
            f"model.layer_scale_init={run.layer_scale_init:g} is too small for total_steps="
            f"{run.total_steps}: the blocks begin at that share of their output and hardly grow; "
            f"raise it to about {fitting:.1g}"
        )


def _of_rates(run: RunSettings) -> Iterator[str]:
    low, high = scale.LEARNING_RATES
    peak = run.base_learning_rate * run.learning_rate_factor
    fitting = fitting_base(run)
    # Beside layerwise decay most layers learn at a fraction of the peak: no value is known to fit.
    cure = f"set it to about {fitting:g}" if run.layerwise_lr_decay == 1 else "bring it there"
    times = run.base_learning_rate / fitting if run.layerwise_lr_decay == 1 else 0
    is_outside = not low <= peak <= high
    if is_outside:
        rule = f"should lie in {low:g}..{high:g}"
    else:
        rule = f"is {times:.0f} times what fits {run.total_steps} steps"
    is_close = is_near(run.base_learning_rate, fitting, NEAR_LEARNING_RATE)
    if (is_outside and not is_close) or times > RATE_TOO_HIGH:
        yield (
            f"optim.base_learning_rate={run.base_learning_rate:g} gives a peak of {peak:.2g} at "
            f"global_batch_size={run.global_batch_size}, which {rule}; {cure}"
        )
    if run.min_learning_rate > RISES * peak:
        yield (
            f"optim.min_learning_rate={run.min_learning_rate:g} is above the peak of {peak:.2g}: "
            "the rate rises to it until the last step; set it to the peak or lower"
        )


def _of_data(run: RunSettings) -> Iterator[str]:
    copies = run.global_batch_size / run.num_images
    if copies > COPIES_IN_A_STEP:
        yield (
            f"global_batch_size={run.global_batch_size} of {run.num_images:,} images takes each "
            f"{copies:.1f} times a step: copies teach little; "
            f"lower it to {run.num_images} or less, or add images"
        )
    patches = (run.local_crop_size_px // run.patch_size) ** 2
    if run.num_local_crops and patches < FEWEST_LOCAL_PATCHES:
        smallest = run.patch_size * math.isqrt(FEWEST_LOCAL_PATCHES)
        yield (
            f"crops.local_crop_size_px={run.local_crop_size_px} is {patches} patch of "
            f"model.patch_size={run.patch_size}: too little to tell an image by; use {smallest} "
            "or more, or crops.num_local_crops=0"
        )
