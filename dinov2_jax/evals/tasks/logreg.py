"""Logistic regression: `python -m dinov2_jax.evals logreg`. Protocol: eval/log_regression.py."""

import argparse
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dinov2_jax import distributed
from dinov2_jax.data.records import DataError
from dinov2_jax.evals.charts import BARS_FILE, bars_sheet
from dinov2_jax.evals.classes import report_classes
from dinov2_jax.evals.logistic import C_GRID, TOLERANCE, Fitted, fit_grid
from dinov2_jax.evals.multi_label import LAYOUT as MULTI_LABEL_LAYOUT
from dinov2_jax.evals.multi_label import check_targets, is_multi_label, read_multi_labels
from dinov2_jax.evals.paper import metric_of
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.scores import (
    average_precision_11_point,
    mean_average_precision_11_point,
    mean_per_class,
    top_classes,
    top_k_accuracy,
)
from dinov2_jax.evals.splits import (
    LAYOUT,
    add_crop_flags,
    find_split,
    image_sizes,
    labels_like,
    open_split,
)
from dinov2_jax.evals.task import Run, Task, require_labels
from dinov2_jax.features.read import FeatureSet
from dinov2_jax.progress import Display
from dinov2_jax.storage import write_whole

SWEEP_FILE = "sweep.json"
DTYPES = ("float64", "float32")
METRICS = ("top1", "mean_per_class", "map_11_point")
_HELD_OUT = 10  # one of so many images of train, where there is no val
_LAYOUT = f"{LAYOUT}; {MULTI_LABEL_LAYOUT}"


class Split(NamedTuple):
    """Features and targets of some images."""

    features: np.ndarray  # [n, d]
    targets: np.ndarray  # class numbers [n], or [n, classes] of 1, 0, -1

    def rows(self, rows: np.ndarray) -> "Split":
        """Some of them."""
        return Split(self.features[rows], self.targets[rows])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    add_crop_flags(parser, split="test, or val where there is no test", resize="--crop")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        help="that C is chosen by; default: the paper's for --dataset, else top1, or map_11_point "
        "for several classes an image",
    )
    parser.add_argument(
        "--solver-dtype",
        choices=DTYPES,
        default="float64",
        help="float32 where the device has no other (TPU): less exact above C = 1",
    )


def run(run: Run) -> Result:
    """Chooses C on held-out images, fits all but the test's again, and tests."""
    flags = run.flags
    read = _read_several if is_multi_label(run.data) else _read_single
    train, val, test, names, index = read(run)
    metric = _metric(flags, is_multi=train.targets.ndim == 2, dataset=run.dataset)
    held_out = "val"
    if val is None:
        held_out = f"1 of {_HELD_OUT} of train"
        rows = np.random.default_rng(run.seed).permutation(len(train.targets))
        count = len(rows) // _HELD_OUT
        if not count:
            raise DataError(f"train of {run.data} has {len(rows)} images; {_HELD_OUT} are needed")
        train, val = train.rows(rows[count:]), train.rows(rows[:count])
    fit = dict(num_classes=len(names), dtype=flags.solver_dtype)
    request = {
        "data_sha256": _sha256([*train, *val]),
        "metric": metric,
        "dtype": flags.solver_dtype,
    }
    sweep = _sweep(run, train, val, metric, request, fit)
    best = max(C_GRID, key=lambda c: (sweep[_key(c)], -c))
    both = Split(*(np.concatenate(pair) for pair in zip(train, val, strict=True)))
    with Display(total=1, done=0, unit="last fit", is_shown=run.is_primary) as display:
        show = functools.partial(display.show, 0)
        (final,) = fit_grid(both.features, both.targets, [best], on_progress=show, **fit)
    _warn(run, final)
    scores = final.classifier.scores(test.features)
    return Result(
        metrics=_metrics(scores, test.targets),
        headline=[metric],
        protocol={
            "feature": "cls",
            "metric": metric,
            "held_out": held_out,
            "best_c": best,
            "iterations": final.iterations,
            "largest_gradient": final.gradient,
            **image_sizes(index),
        },
        counts={
            "train": len(both.targets),
            "test": len(test.targets),
            "classes": len(names),
        },
        details={"sweep": sweep, **_details(run, scores, test.targets, names)},
    )


def _read_single(run: Run):
    """Train, val or None, test, class names, and the index of the features."""
    tested = (run.flags.split,) if run.flags.split else ("test", "val", "validation")
    train = _features(run, open_split(run.data, ("train",)))
    labels = require_labels(train, at=f"train of {run.data}", layout=_LAYOUT)

    def split(found: FeatureSet, at: str) -> Split:
        theirs = require_labels(found, at=f"{at} of {run.data}", layout=_LAYOUT)
        same = labels_like(theirs, label_names=found.label_names, of=train.label_names, at=at)
        return Split(np.asarray(found["cls"]), same)

    path = find_split(run.data, tested)
    test = split(_features(run, open_split(run.data, tested)), "the tested split")
    val = None
    if not run.data.startswith(("hf:", "tfds:")) or run.flags.split:
        held = find_split(run.data, ("val", "validation"), default=path)
        if held != path:
            val = split(_features(run, held), "val")
    return Split(np.asarray(train["cls"]), labels), val, test, train.label_names, train.index


def _read_several(run: Run):
    """Likewise, of images with several classes."""
    tested = (run.flags.split,) if run.flags.split else ("test", "val")
    labels = [read_multi_labels(run.data, names) for names in (("train",), ("val",), tested)]
    if labels[0] is None or labels[2] is None:
        raise DataError(f"{run.data} must have train and {' or '.join(tested)}; {_LAYOUT}")
    if labels[1] is not None and labels[1].at == labels[2].at:
        labels[1] = None
    check_targets(labels[0].targets, names=labels[0].names, at=labels[0].at)
    for each in filter(None, labels[1:]):
        if not (each.targets == 1).any():
            raise DataError(f"{each.at} must have an image with a class; {_LAYOUT}")
    names, splits, index = labels[0].names, [], None
    for each in labels:
        if each is None:
            splits.append(None)
            continue
        features = _features(run, each.source())
        index = index or features.index
        targets = each.rows(features, names=names)
        splits.append(Split(np.asarray(features["cls"]), targets))
    return *splits, names, index


def _features(run: Run, source) -> FeatureSet:
    """Class tokens of images whose short side is that of the crop: nothing but the ends is lost."""
    crop = run.flags.crop or run.model.spec.crop_size_px
    return run.features(source, resize_size_px=run.flags.resize or crop, crop_size_px=crop)


def _metric(flags: argparse.Namespace, *, is_multi: bool, dataset: str) -> str:
    metric = flags.metric or metric_of(dataset=dataset, task="logreg")
    metric = metric or ("map_11_point" if is_multi else "top1")
    if is_multi != (metric == "map_11_point"):
        raise ValueError(
            f"metric {metric} of {dataset} must be map_11_point for images with several classes "
            "each, and another for one; see --metric"
        )
    return metric


def _sweep(
    run: Run, train: Split, val: Split, metric: str, request: Mapping[str, Any], fit: Mapping
) -> dict[str, float]:
    """The metric on held-out images by C, from the file of an earlier call as far as it has it."""
    path = run.out / SWEEP_FILE
    # Together: one that came late would find what the primary had written meanwhile.
    found = distributed.together(lambda: _read_sweep(path, request))
    left = [c for c in C_GRID if _key(c) not in found]
    with Display(total=len(C_GRID), done=len(found), unit="C", is_shown=run.is_primary) as display:
        fits = fit_grid(
            train.features,
            train.targets,
            left,
            on_progress=lambda text: display.show(len(found), text),
            **fit,
        )
        for fitted in fits if left else ():
            _warn(run, fitted)
            scores = fitted.classifier.scores(val.features)
            found[_key(fitted.c)] = _metrics(scores, val.targets)[metric]
            text = json.dumps({"request": request, "sweep": found}, indent=2) + "\n"
            distributed.on_primary(lambda text=text: _write(path, text))
            display.show(len(found), f"C {fitted.c:.3g}: {metric} {found[_key(fitted.c)]:.2f} %")
    return found


def _read_sweep(path: pathlib.Path, request: Mapping[str, Any]) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text())
        return saved["sweep"] if saved["request"] == request else {}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from error


def _sha256(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(epath.Path(path), text)


def _key(c: float) -> str:
    return f"{c:.6g}"


def _warn(run: Run, fitted: Fitted) -> None:
    if fitted.gradient > 10 * TOLERANCE:
        run.say(f"C {fitted.c:.3g} has not converged: gradient {fitted.gradient:.1e}")


def _metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """In per cent."""
    if targets.ndim == 2:
        return {"map_11_point": 100 * mean_average_precision_11_point(scores, targets)}
    ranked = top_classes(scores, 5)
    return {
        "top1": 100 * top_k_accuracy(ranked, targets, 1),
        "top5": 100 * top_k_accuracy(ranked, targets, 5),
        "mean_per_class": 100 * mean_per_class(ranked[:, 0], targets, scores.shape[1]),
    }


def _details(
    run: Run, scores: np.ndarray, targets: np.ndarray, names: Sequence[str]
) -> Mapping[str, Any]:
    if targets.ndim == 1:
        return report_classes(run, scores.argmax(axis=1), targets, names)
    precision = np.array(
        [average_precision_11_point(scores[:, i], targets[:, i]) for i in range(len(names))]
    )
    counts, what = (targets == 1).sum(axis=0), "11-point average precision"
    title = f"logreg of {run.model.name}"
    run.draw(lambda: {BARS_FILE: bars_sheet(precision, counts, names, what=what, title=title)})
    found = zip(names, precision, strict=True)
    return {"average_precision": {k: 100 * float(v) for k, v in found if np.isfinite(v)}}


TASK = Task(
    name="logreg",
    summary="logistic regression with C from a grid, as on the fine-grained sets",
    layout=_LAYOUT,
    add_flags=add_flags,
    run=run,
    reads_urls=True,
)
