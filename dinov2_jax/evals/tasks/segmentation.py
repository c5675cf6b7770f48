"""Semantic segmentation: `python -m dinov2_jax.evals segmentation`.

Protocols: the paper's ("linear", "ms"; settings of the reference's configurations), and k-NN of
patches, without training.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dinov2_jax.arguments import count, positive, positive_number
from dinov2_jax.data.ahead import map_ahead
from dinov2_jax.evals.dense.bank import build_bank, patch_maps, voting_maps
from dinov2_jax.evals.dense.charts import mask_sheets
from dinov2_jax.evals.dense.evaluate import evaluate_masks
from dinov2_jax.evals.dense.fit import fit_head
from dinov2_jax.evals.dense.flags import add_head_flags, num_threads, warmup_steps
from dinov2_jax.evals.dense.heads import SEGMENTATION, load_head, segmentation_head
from dinov2_jax.evals.dense.losses import cross_entropy
from dinov2_jax.evals.dense.mask_protocols import PROTOCOLS, make_slide, make_views
from dinov2_jax.evals.dense.mask_sets import LAYOUT, LAYOUTS, MaskSet, open_mask_set
from dinov2_jax.evals.dense.metrics import iou, segmentation_metrics
from dinov2_jax.evals.dense.predict import Maps, Slide, head_maps, predict_classes
from dinov2_jax.evals.dense.schedules import HeadSchedule
from dinov2_jax.evals.dense.train import Training
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.splits import tested
from dinov2_jax.evals.task import Run, Task

ITERATIONS, WARMUP_STEPS = 40_000, 1_500
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    add = parser.add_argument
    add(
        "--protocol",
        choices=tuple(PROTOCOLS),
        help="linear: a linear head on the last layer (default); ms: on the last four, tested at "
        "five sizes and mirrored; knn: votes of similar patches; with --head, what the head says",
    )
    add("--layout", choices=("auto", *LAYOUTS), default="auto", help="of --data; see below")
    add("--train-split", default="train", metavar="NAME", help="default train")
    add("--split", metavar="NAME", help="tested; default: val, or test where there is no val")
    add("--classes", type=pathlib.Path, metavar="FILE", help="default: classes.txt of --data")
    add(
        "--ignore",
        type=count,
        nargs="+",
        metavar="N",
        help="numbers in the masks that are no class; default 255, and 0 in ADE20K",
    )
    add("--short-side", type=positive, metavar="PX", help="of images; default 512, ms 640")
    add("--crop", type=positive, metavar="PX", help="of views and windows; default: --short-side")
    add(
        "--stride", type=positive, metavar="PX", help="of windows; default 341, ms 320, or 2/3, 1/2"
    )
    add(
        "--ratios",
        type=positive_number,
        nargs="+",
        metavar="X",
        help="sizes tested, times --short-side",
    )
    add("--flip", action=argparse.BooleanOptionalAction, help="test mirror images; default: ms")
    add(
        "--loss-mean",
        choices=("all", "labelled"),
        default="all",
        help="pixels that the loss is divided by; mmseg counts the ignored ones too (default all)",
    )
    add("--neighbors", type=positive, default=20, metavar="K", help="of knn: voters (default 20)")
    add("--vote", choices=("weighted", "majority"), default="weighted", help="of knn")
    add("--temperature", type=positive_number, default=0.07, help="of knn's weights (default 0.07)")
    add("--bank-patches", type=positive, default=200_000, metavar="N", help="of knn: kept at most")
    add_head_flags(parser, iterations=ITERATIONS)


class Predictor(NamedTuple):
    """What predicts, and what is known of it."""

    maps: Maps  # of windows
    slide: Slide
    protocol: dict[str, Any]
    test: MaskSet  # opened before any training: what is wrong with it is known at once
    num_classes: int
    num_train: int


def run(run: Run) -> Result:
    """Trains or loads a head, or keeps a bank of patches; tests; draws."""
    flags, spec, threads = run.flags, run.model.spec, num_threads(run.flags)
    if flags.head is not None:
        predictor = _loaded(run)
    else:
        predictor = _voting(run) if flags.protocol == "knn" else _trained(run)
    name, slide = predictor.protocol["protocol"], predictor.slide
    test = predictor.test
    if len(test.ids) != predictor.num_classes:
        raise ValueError(
            f"{flags.head.path} predicts {predictor.num_classes} classes, and {run.data} has "
            f"{len(test.ids)}; name its classes in classes.txt, or choose another --layout"
        )
    counts, examples = evaluate_masks(
        test,
        functools.partial(
            predict_classes,
            maps=predictor.maps,
            slide=slide,
            mean=spec.mean,
            std=spec.std,
            is_logits=name != "knn",
        ),
        num_classes=len(test.ids),
        num_examples=flags.charts,
        num_threads=threads,
        is_shown=run.is_primary,
    )
    metrics = segmentation_metrics(counts)
    # Not where there are examples: of several processes one may have tested no image.
    if flags.charts:
        title = f"Segmentation ({name}) of {run.dataset} by {run.model.name}"
        run.draw(lambda: mask_sheets(examples, counts, test.class_names, title=title))
    return Result(
        metrics={f"{key}_{name}": value for key, value in metrics.items()},
        headline=[f"miou_{name}"],
        protocol={
            **predictor.protocol,
            **dataclasses.asdict(slide),
            "layout": test.layout,
            "ignored": list(test.ignored),
        },
        counts={
            "train": predictor.num_train,
            "test": len(test),
            "classes": len(test.ids),
        },
        details={
            "iou": {
                label: None if np.isnan(value) else round(100 * float(value), 2)
                for label, value in zip(test.class_names, iou(counts), strict=True)
            },
            "confusion": counts.tolist(),
        },
    )


def _loaded(run: Run) -> Predictor:
    flags = run.flags
    allowed = [flags.protocol] if flags.protocol else SEGMENTATION
    head, variables, facts = load_head(flags.head.path, run.model, allowed=allowed)
    names = {int(number): name for number, name in facts.get("classes", {}).items()}
    test = _open(run, tested(flags), names=names or None)
    return Predictor(
        head_maps(run.model, head, variables, batch_size=run.batch_size),
        _slide(flags, head.protocol),
        {"protocol": head.protocol, "layers": list(head.layers)},
        test,
        head.module.num_classes,
        0,
    )


def _voting(run: Run) -> Predictor:
    flags, model, slide = run.flags, run.model, _slide(run.flags, "knn")
    train, threads = _open(run, (flags.train_split,)), num_threads(flags)
    test = _open(run, tested(flags), names=train.names)
    images = map_ahead(train.read, range(len(train)), num_threads=threads, ahead=2 * threads)
    bank = build_bank(
        images,
        patch_maps(model, batch_size=run.batch_size),
        slide=slide,
        mean=model.spec.mean,
        std=model.spec.std,
        patch_size=model.spec.patch_size,
        num_classes=len(train.ids),
        num_images=len(train),
        limit=flags.bank_patches,
        seed=run.seed,
    )
    if flags.neighbors > len(bank.classes):
        raise ValueError(
            f"--neighbors {flags.neighbors} must not exceed the {len(bank.classes)} patches kept; "
            "lower it, or raise --bank-patches"
        )
    run.say(f"{len(bank.classes):,} patches of {len(train):,} images vote")
    maps = voting_maps(
        model,
        bank,
        num_neighbors=flags.neighbors,
        num_classes=len(train.ids),
        temperature=flags.temperature if flags.vote == "weighted" else None,
        batch_size=run.batch_size,
    )
    protocol = {
        "protocol": "knn",
        "neighbors": flags.neighbors,
        "vote": flags.vote,
        "bank_patches": len(bank.classes),
    }
    return Predictor(maps, slide, protocol, test, len(train.ids), len(train))


def _trained(run: Run) -> Predictor:
    flags, model = run.flags, run.model
    name = flags.protocol or "linear"
    slide, train = _slide(flags, name), _open(run, (flags.train_split,))
    test = _open(run, tested(flags), names=train.names)
    head = segmentation_head(model, name, len(train.ids))
    schedule = HeadSchedule(
        decay="poly",
        peak=flags.learning_rate or LEARNING_RATE,
        total_steps=flags.iterations,
        warmup_steps=warmup_steps(flags, share=WARMUP_STEPS / ITERATIONS),
        warmup_ratio=1e-6,
    )
    over_all = flags.loss_mean == "all"
    settings = {
        "protocol": name,
        "layers": list(head.layers),
        "cached": flags.cached,
        "loss_mean": flags.loss_mean,
        "weight_decay": WEIGHT_DECAY if flags.weight_decay is None else flags.weight_decay,
        "schedule": dataclasses.asdict(schedule),
        "images_per_step": flags.images_per_step,
    }
    variables = fit_head(
        model,
        head,
        train,
        make_views(name, slide, mean=model.spec.mean, std=model.spec.std, is_cached=flags.cached),
        training=Training(
            schedule=schedule,
            weight_decay=settings["weight_decay"],
            clip_norm=None,
            loss=lambda maps, classes, step: cross_entropy(maps, classes, over_all=over_all),
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
        request=settings | {"classes": list(train.ids)},
        facts={"protocol": name, "classes": train.names, "model": model.name},
        pth=flags.pth,
        is_shown=run.is_primary,
    )
    maps = head_maps(model, head, variables, batch_size=run.batch_size)
    return Predictor(maps, slide, settings, test, len(train.ids), len(train))


def _slide(flags: argparse.Namespace, name: str) -> Slide:
    return make_slide(
        name,
        short_side_px=flags.short_side,
        crop_px=flags.crop,
        stride_px=flags.stride,
        ratios=flags.ratios,
        flip=flags.flip,
    )


def _open(run: Run, split: Sequence[str], names: dict[int, str] | None = None) -> MaskSet:
    flags = run.flags
    return open_mask_set(
        run.data,
        split,
        layout=flags.layout,
        classes_file=flags.classes,
        ignored=flags.ignore,
        names=names,
        num_threads=num_threads(flags),
    )


TASK = Task(
    name="segmentation",
    summary="semantic segmentation: a linear head, at one size or several, or k-NN of patches",
    layout=LAYOUT,
    add_flags=add_flags,
    run=run,
)
