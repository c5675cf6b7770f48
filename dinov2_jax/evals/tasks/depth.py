"""Monocular depth: `python -m dinov2_jax.evals depth`.

Protocols: the paper's ("linear1", "linear4", "dpt"; settings of the reference's configurations and
of the public Monocular-Depth-Estimation-Toolbox).
"""

import argparse
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from dinov2_jax.arguments import count, positive, positive_number
from dinov2_jax.evals.dense import depth_views
from dinov2_jax.evals.dense.charts import SHEET_FILE, depth_sheet
from dinov2_jax.evals.dense.depth_sets import (
    LAYOUT,
    LAYOUTS,
    DepthSet,
    find_layout,
    judged,
    open_depth_set,
)
from dinov2_jax.evals.dense.evaluate import evaluate_depths, require_depth
from dinov2_jax.evals.dense.fit import Views, fit_head
from dinov2_jax.evals.dense.flags import add_head_flags, num_threads, warmup_steps
from dinov2_jax.evals.dense.heads import DEPTH, depth_head, load_head
from dinov2_jax.evals.dense.losses import SIGLOSS_WARMUP_STEPS, depth_loss
from dinov2_jax.evals.dense.metrics import DEPTH_METRICS
from dinov2_jax.evals.dense.predict import Maps, head_maps, normalise, predict_depth
from dinov2_jax.evals.dense.resample import resize_bilinear, scaled_size
from dinov2_jax.evals.dense.schedules import HeadSchedule
from dinov2_jax.evals.dense.train import Training
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.task import Run, Task

ITERATIONS, WARMUP_STEPS = 38_400, 12_800
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.01, 35.0
B1_CYCLE = (0.95, 0.85)
SUN_SIZE = (480, 640)
CROPS = {"nyu": (416, 544), "kitti": (352, 704)}
BRIGHTNESS = {"kitti": (0.9, 1.1)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    add = parser.add_argument
    add(
        "--protocol",
        choices=DEPTH,
        help="linear1: a linear head on the last layer (default); linear4: on four layers; dpt: a "
        "DPT head on the same four; with --head, what the head says",
    )
    add("--layout", choices=("auto", *LAYOUTS), default="auto", help="of --data; see below")
    add(
        "--scale",
        type=positive_number,
        metavar="X",
        help="units of depth files in a metre; default 1000, KITTI 256",
    )
    add(
        "--range",
        type=positive_number,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="of the head, in metres; default: what its file says, else 0.001 10, KITTI 0.001 80",
    )
    add("--mask", choices=("all", "eigen", "garg"), help="pixels judged; default: the layout's")
    add("--holdout", type=float, default=0.2, help="share tested where there is no split: the last")
    add(
        "--short-side",
        type=positive,
        metavar="PX",
        help="of images in the network; default: as they are, SUN RGB-D 480",
    )
    add(
        "--crop",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of training; default: NYU 416 544, KITTI 352 704, else, and with --short-side, the "
        "image less a tenth",
    )
    add(
        "--flip", action=argparse.BooleanOptionalAction, default=True, help="test mirror images too"
    )
    add("--gradient-weight", type=float, default=0.0, help="of the gradient loss (default 0)")
    add(
        "--images-per-loss",
        type=count,
        default=2,
        metavar="N",
        help="SigLoss is taken of so many images; the reference has 2 on each GPU; 0: all",
    )
    add_head_flags(parser, iterations=ITERATIONS)


class Predictor(NamedTuple):
    """What predicts, and what is known of it."""

    maps: Maps
    protocol: dict[str, Any]
    num_train: int


def run(run: Run) -> Result:
    """Trains or loads a head; tests; draws."""
    flags, spec = run.flags, run.model.spec
    layout = find_layout(run.data) if flags.layout == "auto" else flags.layout
    facts = LAYOUTS[layout]
    _check_flags(flags)
    is_own, mask = layout == "plain" and flags.range is not None, flags.mask or facts.mask
    judged_range = tuple(flags.range) if is_own else facts.depth_range
    judging = dict(is_judged=functools.partial(judged, mask=mask), depth_range=judged_range)
    test = _open(run, layout, "test")
    require_depth(test, **judging)  # a wrong unit is known before the training
    predictor = _trained(run, layout) if flags.head is None else _loaded(run, layout)
    name = predictor.protocol["protocol"]

    def predict(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if flags.short_side:
            image = resize_bilinear(image, *scaled_size(*image.shape[:2], flags.short_side))
        elif layout == "sunrgbd":
            image = resize_bilinear(image, *SUN_SIZE)
        return predict_depth(
            image, predictor.maps, mean=spec.mean, std=spec.std, size=size, flip=flags.flip
        )

    errors, num_tested, examples = evaluate_depths(
        test,
        predict,
        **judging,
        clip=facts.clip,
        num_examples=flags.charts,
        num_threads=num_threads(flags),
        is_shown=run.is_primary,
    )
    # Not where there are examples: of several processes one may have tested no image.
    if flags.charts:
        title = f"Depth ({name}) of {run.dataset} by {run.model.name}"
        run.draw(lambda: {SHEET_FILE: depth_sheet(examples, title=title)})
    return Result(
        metrics={f"{metric}_{name}": errors[metric] for metric in DEPTH_METRICS},
        headline=[f"{metric}_{name}" for metric in ("rmse", "abs_rel", "d1")],
        protocol={
            **predictor.protocol,
            "layout": layout,
            "scale": test.scale,
            "short_side_px": flags.short_side,
            "judged": mask,
            "judged_range": list(judged_range),
            "clip": facts.clip,
            "flip": flags.flip,
        },
        counts={
            "train": predictor.num_train,
            "test": len(test),
            "without_depth": len(test) - num_tested,
        },
    )


def _check_flags(flags: argparse.Namespace) -> None:
    if flags.range and flags.range[0] >= flags.range[1]:
        low, high = flags.range
        raise ValueError(f"--range {low:g} {high:g} must be the smaller depth and the larger one")
    if not 0 < flags.holdout < 1:
        raise ValueError(f"--holdout {flags.holdout:g} must be a share between 0 and 1")


def _loaded(run: Run, layout: str) -> Predictor:
    flags = run.flags
    # The files of released heads do not say; SUN RGB-D is the test of heads for NYU.
    default = LAYOUTS["nyu" if layout == "sunrgbd" else layout].depth_range
    asked = None if flags.range is None else tuple(flags.range)
    head, variables, _ = load_head(
        flags.head.path,
        run.model,
        allowed=[flags.protocol] if flags.protocol else DEPTH,
        depth_range=asked,
        default_range=default,
    )
    protocol = {
        "protocol": head.protocol,
        "layers": list(head.layers),
        "depth_range": list(head.depth_range),
    }
    return Predictor(head_maps(run.model, head, variables, batch_size=run.batch_size), protocol, 0)


def _trained(run: Run, layout: str) -> Predictor:
    flags, model = run.flags, run.model
    name, train = flags.protocol or DEPTH[0], _open(run, layout, "train")
    depth_range = tuple(flags.range or LAYOUTS[layout].depth_range)
    head = depth_head(model, name, depth_range)
    schedule = HeadSchedule(
        decay="cosine",
        peak=flags.learning_rate or LEARNING_RATE,
        total_steps=flags.iterations,
        warmup_steps=warmup_steps(flags, share=WARMUP_STEPS / ITERATIONS),
        warmup_ratio=1e-3,
        b1_cycle=B1_CYCLE,
    )
    # Like the warm-up of the learning rate, so that a short training is not all warm-up.
    loss_warmup_steps = round(SIGLOSS_WARMUP_STEPS / ITERATIONS * flags.iterations)
    settings = {
        "protocol": name,
        "layers": list(head.layers),
        "depth_range": list(depth_range),
        "cached": flags.cached,
        "weight_decay": WEIGHT_DECAY if flags.weight_decay is None else flags.weight_decay,
        "gradient_weight": flags.gradient_weight,
        "loss_warmup_steps": loss_warmup_steps,
        "images_per_loss": flags.images_per_loss,
        "schedule": dataclasses.asdict(schedule),
        "images_per_step": flags.images_per_step,
    }
    loss = functools.partial(
        depth_loss,
        warmup_steps=loss_warmup_steps,
        gradient_weight=flags.gradient_weight,
        images_per_loss=flags.images_per_loss,
    )
    variables = fit_head(
        model,
        head,
        train,
        _views(flags, layout, train, model.spec),
        training=Training(
            schedule=schedule,
            weight_decay=settings["weight_decay"],
            clip_norm=CLIP_NORM,
            loss=loss,
            save_steps=flags.save_steps,
        ),
        features=run.features if flags.cached else None,
        batch_size=flags.images_per_step,
        images_at_once=run.batch_size,
        seed=run.seed,
        num_threads=num_threads(flags),
        out=run.out,
        at=run.data,
        begin_again=flags.force,
        request=settings,
        facts={"protocol": name, "depth_range": list(depth_range), "model": model.name},
        pth=flags.pth,
        is_shown=run.is_primary,
    )
    maps = head_maps(model, head, variables, batch_size=run.batch_size)
    return Predictor(maps, settings, len(train))


def _views(flags: argparse.Namespace, layout: str, train: DepthSet, spec: Any) -> Views:
    prepared = functools.partial(
        depth_views.prepared,
        short_side_px=flags.short_side,
        box=depth_views.NYU_CROP if layout == "nyu" else depth_views.WHOLE,
    )
    if flags.crop:
        crop_px = tuple(flags.crop)
    elif layout in CROPS and not flags.short_side:
        crop_px = CROPS[layout]
    else:
        crop_px = tuple(round(0.9 * side) for side in prepared(*train.read(0))[1].shape)
    augment = depth_views.DepthAugment(
        crop_px=crop_px, brightness=BRIGHTNESS.get(layout, (0.75, 1.25))
    )

    def random(image, depth, rng):
        image, depth = augment(*prepared(image, depth), rng)
        return normalise(image, spec.mean, spec.std), depth

    def fixed(image, depth):
        return depth_views.fixed_view(*prepared(image, depth), crop_px=crop_px)

    settings = f"{'centre' if flags.cached else augment} {layout} {crop_px} {flags.short_side}"
    return Views(random=random, fixed=fixed, size_px=crop_px, settings=settings)


def _open(run: Run, layout: str, split: str) -> DepthSet:
    flags = run.flags
    return open_depth_set(
        run.data,
        split,
        layout=layout,
        scale=flags.scale,
        holdout=flags.holdout,
    )


TASK = Task(
    name="depth",
    summary="monocular depth: linear heads on one layer or four, or a DPT head",
    layout=LAYOUT,
    add_flags=add_flags,
    run=run,
)
