"""Hit rates and associations by group of people: `python -m dinov2_jax.evals fairness`.

Protocol: section 8 of the paper: a linear classifier on frozen features, its five best classes.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinov2_jax.convert.safetensors_file import open_safetensors
from dinov2_jax.convert.torch_file import read_torch
from dinov2_jax.data.records import DataError
from dinov2_jax.evals.fairness import (
    associated,
    describe_gap,
    gap,
    hits,
    rates_by_group,
)
from dinov2_jax.evals.fairness_sets import LAYOUT, read_meanings, read_people
from dinov2_jax.evals.fitted import open_exactly
from dinov2_jax.evals.further_sets import located
from dinov2_jax.evals.linear_probe import Columns, Variant
from dinov2_jax.evals.probe_fit import (
    NUM_LAYERS,
    LinearClassifier,
    add_probe_flags,
    columns_of,
    fit_probe,
    probe_what,
)
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.scores import top_classes
from dinov2_jax.evals.splits import add_size_flags, crop_sizes, image_sizes, labels_like, open_split
from dinov2_jax.evals.task import Run, Task, require_labels

RANKS = 5
MEANINGS_FILE = "meanings.csv"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    add = parser.add_argument
    add(
        "--train",
        metavar="DIR",
        help="train/ and val/, each with a folder per class: trains the classifier. This path and "
        "the following start at the folder of --data",
    )
    add("--head", metavar="FILE", help="or a classifier: of the task linear, or a released one")
    add("--classes", metavar="FILE", help="names of the head's classes, one a line")
    add(
        "--meanings",
        metavar="FILE",
        help="lines 'class,concept' or 'class,association' (human, possibly_human, non_human, "
        f"crime); default: {MEANINGS_FILE}, or without it a class means the concept of its name",
    )
    add(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="names in the file, as image=imageRelPath",
    )
    add("--group-by", nargs="+", default=[], metavar="COLUMN", help="further groups")
    add("--by-household", action="store_true", help="each household counts once in its group")
    add("--least-probability", type=float, default=0.1, help="of a class with an association")
    add_size_flags(parser)
    add_probe_flags(parser)


def run(run: Run) -> Result:
    """Classifies every image, then counts by group."""
    flags = run.flags
    if (flags.train is None) == (flags.head is None):
        raise ValueError("give the classifier by --train DIR or by --head FILE, one of them")
    if any("=" not in text for text in flags.columns):
        raise ValueError(f"--columns {' '.join(flags.columns)} must be of the form ours=theirs")
    people = read_people(
        run.data,
        columns=dict(text.split("=", 1) for text in flags.columns),
        group_by=flags.group_by,
    )
    if flags.by_household and people.households is None:
        raise ValueError(
            f"--by-household: {run.data} has no column household; name it by --columns"
        )
    file = _located(run, flags.meanings or MEANINGS_FILE)
    if not os.path.exists(file):
        if flags.meanings:
            raise DataError(f"--meanings {file} is not there; give a file of lines 'class,meaning'")
        file = None
    sizes = crop_sizes(flags)
    what = probe_what(run)
    features = run.features(open_exactly(people.images, at=run.data), what=what, **sizes)
    if flags.train:
        classifier, classes, settings = _train(run, what, sizes)
    else:
        classifier, classes, settings = _read_head(run, columns_of(features))
    meanings = read_meanings(file, classes, are_associations=people.concepts is None)
    logits = classifier.logits(features)
    ranked = top_classes(logits, RANKS)
    there = features.ids
    groups = {name: [x[i] for i in there] for name, x in people.groups.items()}
    if people.concepts is None:
        probabilities = np.take_along_axis(_softmax(logits), ranked, axis=1)
        found = associated(
            ranked, probabilities, meanings, least_probability=flags.least_probability
        )
    else:
        concepts = [people.concepts[i] for i in there]
        _say_unknown(run, concepts, meanings)
        found = {"": hits(ranked, meanings, concepts)}
    households = None
    if flags.by_household:
        households = [people.households[i] for i in there]
    metrics, details = _by_group(run, found, groups, households)
    overall = {f"{name or 'hits'}_all": 100 * float(x.mean()) for name, x in found.items()}
    return Result(
        metrics=metrics | overall,
        headline=[name for name in metrics if not name.startswith("gap_")],
        protocol={
            "ranks": RANKS,
            "by_household": flags.by_household,
            "meanings": file and os.path.basename(file),
            "least_probability": None if people.concepts else flags.least_probability,
            **settings,
            **image_sizes(features.index),
        },
        counts={"test": len(features), "classes": len(classes), **_sizes(groups)},
        details=details,
    )


def _say_unknown(run: Run, concepts, meanings) -> None:
    unknown = sorted(frozenset().union(*concepts) - frozenset().union(*meanings))
    if unknown:
        run.say(
            f"no class means {len(unknown)} of the concepts, such as {', '.join(unknown[:3])}: "
            "nothing can hit them; see --meanings"
        )


def _by_group(run: Run, found, groups, households) -> tuple[dict[str, float], dict[str, Any]]:
    """Per cent by group, and gaps in points and per cent of the best; said line by line."""
    metrics, details = {}, {}
    for kind, values in found.items():
        for name, of in groups.items():
            rates = rates_by_group(values, of, households=households)
            label = f"{kind}_{name}" if kind else name
            prefix = f"{kind}_" if kind else f"{name}_"
            metrics |= {f"{prefix}{group}": 100 * rate for group, rate in rates.items()}
            apart = gap(rates)
            metrics[f"gap_points_{label}"] = 100 * apart.points
            metrics[f"gap_relative_{label}"] = 100 * apart.relative
            details[label] = {"best": apart.best, "worst": apart.worst}
            run.say(describe_gap(label.replace("_", " "), rates))
    return metrics, details


def _train(run: Run, what: str, sizes) -> tuple[LinearClassifier, Sequence[str], dict[str, Any]]:
    """The best of the probe's grid on a labelled folder."""
    flags, data = run.flags, _located(run, run.flags.train)
    train = run.features(open_split(data, ("train",)), what=what, **sizes)
    val = run.features(open_split(data, ("val", "validation", "test")), what=what, **sizes)
    layout = "train/ and val/ (or test/), each with a folder of images per class"
    train_labels = require_labels(train, at=f"train of {data}", layout=layout)
    val_labels = labels_like(
        require_labels(val, at=f"val of {data}", layout=layout),
        label_names=val.label_names,
        of=train.label_names,
        at=f"val of {data}",
    )
    if flags.classes:
        raise ValueError("--classes names those of a --head; those of --train are its folders")
    classifier, settings, _ = fit_probe(
        run,
        train=train,
        train_labels=train_labels,
        val=val,
        val_labels=val_labels,
        num_classes=len(train.label_names),
        what={"index": dict(train.index)},
    )
    return classifier, train.label_names, settings


def _read_head(
    run: Run, columns: Columns
) -> tuple[LinearClassifier, Sequence[str], dict[str, Any]]:
    """A file of weight `[c, d]` and bias `[c]`: what it sees follows from its width."""
    path = pathlib.Path(_located(run, run.flags.head))
    if path.suffix == ".safetensors":
        flat, facts = open_safetensors(path)
    else:
        flat, facts = read_torch(path)[0], {}
    if set(flat) != {"weight", "bias"}:
        raise DataError(f"{path} must hold weight and bias, not {sorted(flat)[:4]}")
    weight, bias = (np.asarray(flat[name], np.float32) for name in ("weight", "bias"))
    variants = [Variant(n, has_mean) for n in NUM_LAYERS for has_mean in (False, True)]
    widths = {
        n.num_layers * columns.cls_dim + n.has_mean * columns.mean_dim: n
        for n in variants
        if n.num_layers <= columns.num_layers
    }
    if weight.shape[1] not in widths:
        raise DataError(
            f"{path} sees {weight.shape[1]} numbers of an image, but this model has "
            f"{', '.join(f'{w} ({v.name})' for w, v in widths.items())}; it is of another model"
        )
    if run.flags.classes:
        classes = pathlib.Path(_located(run, run.flags.classes)).read_text().splitlines()
    else:
        classes = json.loads(facts.get("classes", "[]"))
    if len(classes) != len(weight):
        raise DataError(
            f"{path} has {len(weight)} classes and there are {len(classes)} names; give --classes"
        )
    variant = widths[weight.shape[1]]
    classifier = LinearClassifier(variant.name, weight.T, bias, columns.of(variant))
    settings = {"classifier": variant.name, "head": os.path.basename(path)}
    return classifier, tuple(classes), settings


def _located(run: Run, path: str) -> str:
    data = os.path.expanduser(run.data)
    return located(path, data=data if os.path.isdir(data) else os.path.dirname(data))


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _sizes(groups) -> dict[str, int]:
    """Images in each group."""
    return {
        f"{name}_{group}": of.count(group)
        for name, of in groups.items()
        for group in sorted({x for x in of if x is not None})
    }


TASK = Task(
    name="fairness",
    summary="hit rates by income and region, associations by gender, skin and age, and gaps",
    layout=LAYOUT,
    add_flags=add_flags,
    run=run,
)
