"""Linear probe: `python -m dinov2_jax.evals linear`. Protocol: the paper's B.3, eval/linear.py."""

import argparse
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dinov2_jax.convert.safetensors_file import write_safetensors
from dinov2_jax.data.records import Source
from dinov2_jax.evals.classes import report_classes
from dinov2_jax.evals.command import positive
from dinov2_jax.evals.further_sets import LAYOUT as SETS_LAYOUT
from dinov2_jax.evals.further_sets import (
    Found,
    FurtherSet,
    Score,
    judge_corruptions,
    judge_images,
    judge_label_sets,
    located,
    parse_sets,
)
from dinov2_jax.evals.linear_probe import (
    LEARNING_RATES,
    Columns,
    Variant,
    init_probe,
    learning_rates,
)
from dinov2_jax.evals.probe_batches import AugmentedBatches, CachedBatches, probe_pieces, what_for
from dinov2_jax.evals.probe_choice import choose, logits_of
from dinov2_jax.evals.probe_training import STATE_FILE, train_probe
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.scores import ALEXNET_ERROR, top_classes, top_k_accuracy
from dinov2_jax.evals.splits import (
    LAYOUT,
    add_crop_flags,
    image_sizes,
    labels_like,
    open_split,
    tested,
)
from dinov2_jax.evals.task import Run, Task, require_classes, require_labels
from dinov2_jax.features.index import names_sha256
from dinov2_jax.features.read import FeatureSet

CLASSIFIER_FILE = "classifier.safetensors"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    add_crop_flags(parser)
    add = parser.add_argument
    add("--iterations", type=positive, default=12_500, help="steps of SGD (default 12500)")
    add("--probe-batch-size", type=positive, default=1024, help="images a step (default 1024)")
    add(
        "--lrs",
        nargs="+",
        default=["paper"],
        metavar="LR",
        help="paper (default), code (times batch / 256), or numbers: "
        + "; ".join(f"{name}: {', '.join(map(str, x))}" for name, x in LEARNING_RATES.items()),
    )
    add("--layers", type=positive, nargs="+", metavar="N", help="of the last blocks (default 1 4)")
    add("--augment", action="store_true", help="train on random resized crops and flips")
    add("--save-every", type=positive, default=1250, help="iterations a killed run may lose")
    add(
        "--test",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH[:KIND]",
        help=f"judge the best on other sets too; relative paths start at --data; {SETS_LAYOUT}",
    )
    add(
        "--classes",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="of the set NAME: its classes, one a line; behind a tab the training class's name or "
        "number",
    )
    add("--alexnet-errors", metavar="FILE", help="JSON: of corruptions beyond ImageNet-C's 15")


def run(run: Run) -> Result:
    """Trains the grid, takes the best on the tested split, and judges it on the further sets."""
    flags = run.flags
    further = parse_sets(flags.test, flags.classes, data=run.data)
    alexnet = _alexnet_errors(flags.alexnet_errors, data=run.data)
    rates = _rates(flags)
    layers = _layers(flags.layers, run.model.spec.depth, run.say)
    variants = tuple(Variant(n, has_mean) for n in layers for has_mean in (False, True))
    embed = functools.partial(
        run.features,
        what=what_for(max(layers)),
        resize_size_px=flags.resize,
        crop_size_px=flags.crop,
    )
    train = open_split(run.data, ("train",))
    names = train.label_names
    require_classes(len(names), at=f"train of {run.data}", layout=LAYOUT)
    val = embed(open_split(run.data, tested(flags)))
    labels = labels_like(
        require_labels(val, at=f"the tested split of {run.data}", layout=LAYOUT),
        label_names=val.label_names,
        of=names,
        at="the tested split",
    )
    columns = _columns(val)
    batches, num_train = _batches(run, train, embed, max(layers))
    settings = {
        "iterations": flags.iterations,
        "batch_size": flags.probe_batch_size,
        "learning_rates": list(rates),
        "classifiers": [variant.name for variant in variants],
        "seed": run.seed,
        "augment": flags.augment,
        "features_sha256": _features_sha256(val, train, num_train),
    }
    params = _train(run, batches, variants, columns, rates, len(names), settings)
    grid, (i, j) = choose(
        params, probe_pieces(val), labels, variants=variants, columns=columns, rates=rates
    )
    best = params[variants[i].name]

    def score(features: FeatureSet) -> np.ndarray:
        return logits_of(best, j, probe_pieces(features), seen=columns.of(variants[i]))

    if run.is_primary:
        _save_classifier(run.out / CLASSIFIER_FILE, best, j, names)
    ranked = top_classes(score(val), 5)
    metrics = {f"top{k}": 100 * top_k_accuracy(ranked, labels, k) for k in (1, 5)}
    headline = ["top1"]
    counts = {"train": num_train, "test": len(val), "classes": len(names)}
    details = {"grid": grid, **report_classes(run, ranked[:, 0], labels, names)}
    for each in further:
        found = _judge(each, score, val, names, embed, alexnet)
        metrics |= {f"{each.name}/{name}": value for name, value in found.metrics.items()}
        headline += [f"{each.name}/{name}" for name in found.headline]
        counts |= {f"{each.name}/{name}": value for name, value in found.counts.items()}
        details |= {each.name: found.details} if found.details else {}
    chosen = {"classifier": variants[i].name, "learning_rate": rates[j]}
    return Result(
        metrics=metrics,
        headline=headline,
        protocol={**chosen, **settings, **image_sizes(val.index)},
        counts=counts,
        details=details,
    )


def _train(run, batches, variants, columns, rates, num_classes: int, settings) -> Any:
    """The classifiers at the end of the schedule, on the host."""
    flags = run.flags
    start = init_probe(
        jax.random.key(run.seed),
        variants,
        columns=columns,
        num_rates=len(rates),
        num_classes=num_classes,
    )
    num_weights = sum(x.size for x in jax.tree.leaves(start.params))
    run.say(
        f"{len(variants) * len(rates)} classifiers of {num_classes} classes: "
        f"{num_weights:,} weights, {8 * num_weights / 2**20:,.0f} MiB with their momentum on each "
        f"device; {flags.iterations:,} x {flags.probe_batch_size:,} images"
    )
    state = train_probe(
        start,
        batches,
        rates=rates,
        variants=variants,
        columns=columns,
        total_steps=flags.iterations,
        batch_size=flags.probe_batch_size,
        file=run.out / STATE_FILE,
        settings=settings,
        save_every=flags.save_every,
        anew=flags.force,
        is_primary=run.is_primary,
    )
    return jax.device_get(state.params)


def _rates(flags: argparse.Namespace) -> tuple[float, ...]:
    grid = flags.lrs[0]
    if grid not in LEARNING_RATES or len(flags.lrs) > 1:
        try:
            grid = [float(text) for text in flags.lrs]
        except ValueError:
            grid = [0.0]
        if min(grid) <= 0:
            raise ValueError(f"--lrs {' '.join(flags.lrs)} must be paper, code or numbers above 0")
    return learning_rates(grid, batch_size=flags.probe_batch_size)


def _layers(asked: list[int] | None, depth: int, say) -> list[int]:
    layers = sorted(set(asked or (1, 4)))
    if asked and layers[-1] > depth:
        raise ValueError(f"--layers {layers[-1]} must not exceed the model's {depth} blocks")
    kept = [n for n in layers if n <= depth]
    if kept != layers:
        say(f"the model has {depth} blocks: classifiers see the last {kept[0]} alone")
    return kept


def _columns(features: FeatureSet) -> Columns:
    arrays = features.index["arrays"]
    num_layers, cls_dim = arrays["layers_cls"]["shape"]
    return Columns(num_layers, cls_dim, arrays["layers_mean"]["shape"][-1])


def _batches(run: Run, train: Source, embed, num_layers: int):
    """What to train on, and of how many images."""
    flags = run.flags
    if not flags.augment:
        features = embed(train)
        labels = require_labels(features, at=f"train of {run.data}", layout=LAYOUT)
        return CachedBatches(features, labels, seed=run.seed), len(features)
    sizes = dict(resize_size_px=flags.resize, crop_size_px=flags.crop, crop=True)
    batches = AugmentedBatches(
        run.model,
        train,
        num_layers=num_layers,
        crop_size_px=run.model.sizes(**sizes)["crop_size_px"],
        per_device_batch_size=run.batch_size,
        num_threads=run.num_threads or min(os.cpu_count() or 1, 16),
        seed=run.seed,
    )
    return batches, len(train)


def _features_sha256(val: FeatureSet, train: Source, num_train: int) -> str:
    """Of all that decides the features trained on."""
    made = {
        name: val.index[name]
        for name in ("what", "image_shape", "resize_size_px", "uneven", "compute_dtype")
    }
    weights = val.index["model"]["weights_sha256"]
    of = [made, weights, names_sha256(train), len(train), list(train.label_names), num_train]
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def _save_classifier(path: pathlib.Path, classifiers, rate: int, names: Sequence[str]) -> None:
    """In the layout of the released classifiers."""
    weight = np.ascontiguousarray(classifiers["kernel"][:, rate].T)
    facts = {"classes": json.dumps(list(names))}
    write_safetensors(path, {"weight": weight, "bias": classifiers["bias"][rate]}, facts)


def _alexnet_errors(path: str | None, *, data: str) -> dict[str, float]:
    given = json.loads(pathlib.Path(located(path, data=data)).read_text()) if path else {}
    return {**ALEXNET_ERROR, **given}


def _judge(each: FurtherSet, score: Score, val: FeatureSet, names, embed, alexnet) -> Found:
    if each.kind == "label_sets":
        return judge_label_sets(val, score, path=each.path, num_classes=len(names))

    def judge(path: str, at: str) -> Found:
        return judge_images(embed(path), score, of=names, at=at, file=each.classes)

    if each.kind == "images":
        return judge(each.path, each.name)
    return judge_corruptions(
        each.path, lambda path, at: 1 - judge(path, at).metrics["top1"] / 100, alexnet=alexnet
    )


TASK = Task(
    name="linear",
    summary="the grid of linear classifiers, also judged on further sets",
    layout=LAYOUT,
    add_flags=add_flags,
    run=run,
)
