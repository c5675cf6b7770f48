"""Linear probe: `python -m dinov2_jax.evals linear`. Protocol: the paper's B.3, eval/linear.py."""

import argparse
import functools
import json
import os
import pathlib
from typing import Any

import numpy as np

from dinov2_jax.convert.safetensors_file import write_safetensors
from dinov2_jax.data.records import Source
from dinov2_jax.evals.classes import report_classes
from dinov2_jax.evals.further_sets import LAYOUT as SETS_LAYOUT
from dinov2_jax.evals.further_sets import (
    Found,
    FurtherSet,
    Score,
    check_sets,
    judge_corruptions,
    judge_images,
    judge_label_sets,
    located,
    parse_sets,
)
from dinov2_jax.evals.probe_batches import AugmentedBatches
from dinov2_jax.evals.probe_fit import (
    LinearClassifier,
    add_probe_flags,
    fit_probe,
    probe_layers,
    probe_rates,
    probe_what,
)
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.scores import ALEXNET_ERROR, top_classes, top_k_accuracy
from dinov2_jax.evals.splits import (
    LAYOUT,
    add_crop_flags,
    crop_sizes,
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
    add_probe_flags(parser)
    add = parser.add_argument
    add("--augment", action="store_true", help="train on random resized crops and flips")
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
    probe_rates(flags)  # wrong ones are known before any work
    embed = functools.partial(run.features, what=probe_what(run), **crop_sizes(flags))
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
    check_sets(further, val, of=names, alexnet=alexnet)
    trained_on, num_train = _trained_on(run, train, embed)
    classifier, protocol, grid = fit_probe(
        run,
        **trained_on,
        val=val,
        val_labels=labels,
        num_classes=len(names),
        what={"augment": flags.augment, **_facts(val, train)},
    )
    if run.is_primary:
        _save_classifier(run.out / CLASSIFIER_FILE, classifier, names)
    ranked = top_classes(classifier.logits(val), 5)
    metrics = {f"top{k}": 100 * top_k_accuracy(ranked, labels, k) for k in (1, 5)}
    headline = ["top1"]
    counts = {"train": num_train, "test": len(val), "classes": len(names)}
    details = {"grid": grid, **report_classes(run, ranked[:, 0], labels, names)}
    for each in further:
        found = _judge(each, classifier.logits, val, names, embed, alexnet)
        metrics |= {f"{each.name}/{name}": value for name, value in found.metrics.items()}
        headline += [f"{each.name}/{name}" for name in found.headline]
        counts |= {f"{each.name}/{name}": value for name, value in found.counts.items()}
        details |= {each.name: found.details} if found.details else {}
    return Result(
        metrics=metrics,
        headline=headline,
        protocol={**protocol, "augment": flags.augment, **image_sizes(val.index)},
        counts=counts,
        details=details,
    )


def _trained_on(run: Run, train: Source, embed) -> tuple[dict[str, Any], int]:
    """What `fit_probe` is to train on, and of how many images."""
    flags = run.flags
    if not flags.augment:
        features = embed(train)
        labels = require_labels(features, at=f"train of {run.data}", layout=LAYOUT)
        return {"train": features, "train_labels": labels}, len(features)
    sizes = run.model.sizes(**crop_sizes(flags), crop=True)
    batches = AugmentedBatches(
        run.model,
        train,
        num_layers=max(probe_layers(run)),
        crop_size_px=sizes["crop_size_px"],
        per_device_batch_size=run.batch_size,
        num_threads=run.num_threads or min(os.cpu_count() or 1, 16),
        seed=run.seed,
    )
    return {"batches": batches}, len(train)


def _facts(val: FeatureSet, train: Source) -> dict[str, Any]:
    """All that decides the features trained on, which are made as those of `val`."""
    made = ("what", "image_shape", "resize_size_px", "uneven", "compute_dtype")
    return {
        **{name: val.index[name] for name in made},
        "weights_sha256": val.index["model"]["weights_sha256"],
        "images": [names_sha256(train), len(train), list(train.label_names)],
    }


def _save_classifier(path: pathlib.Path, classifier: LinearClassifier, names) -> None:
    """In the layout of the released classifiers."""
    weight = np.ascontiguousarray(classifier.kernel.T)
    facts = {"classes": json.dumps(list(names)), "sees": classifier.name}
    write_safetensors(path, {"weight": weight, "bias": classifier.bias}, facts)


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
    reads_urls=True,
)
