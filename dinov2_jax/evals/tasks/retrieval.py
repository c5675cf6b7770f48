"""Instance retrieval by frozen global features: `python -m dinov2_jax.evals retrieval`.

Protocol: section 7.3 of the paper, which states neither feature nor size; the defaults are CLS, no
crop of the query's box, and sizes that later work of the authors gives.
"""

import argparse
import functools
from typing import Any

import numpy as np

from dinov2_jax.arguments import positive
from dinov2_jax.evals.fitted import FEATURES, KINDS, Fit, fitted_features
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.retrieval import (
    MET_NEIGHBORS,
    classify_by_neighbors,
    met_scores,
    positive_ranks,
    score_level,
    tune_met,
)
from dinov2_jax.evals.retrieval_sets import LAYOUT, MetSet, RetrievalSet, open_retrieval
from dinov2_jax.evals.retrieval_sheet import NUM_FOUND, retrieval_sheet
from dinov2_jax.evals.search import rankings, search
from dinov2_jax.evals.task import Run, Task
from dinov2_jax.evals.whitening import whitened

SHEET_FILE = "retrieval.png"
# By kind of set: how images get their size.
_FITS = {
    "revisited": Fit(kind="pad", size_px=224),
    "amstertime": Fit(kind="crop", size_px=224, resize_px=256),
    "met": Fit(kind="native"),
    "list": Fit(kind="crop", size_px=224, resize_px=256),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    parser.add_argument(
        "--fit",
        choices=KINDS,
        help="crop: short side to --resize, centred square of --size; pad: larger side to --size, "
        "then a square; native: sides to whole patches, the larger at most --size. Default: pad "
        "for Oxford and Paris, native for the Met, crop for the others",
    )
    parser.add_argument("--size", type=positive, metavar="PX", help="default 224; native: no limit")
    parser.add_argument("--resize", type=positive, metavar="PX", help="of --fit crop (default 256)")
    parser.add_argument("--feature", choices=FEATURES, default="cls")
    parser.add_argument("--query-boxes", action="store_true", help="cut queries to their boxes")
    parser.add_argument(
        "--whiten",
        type=positive,
        metavar="D",
        help="PCA-whitening to D numbers, learnt on the database",
    )
    parser.add_argument("--mini", action="store_true", help="the Met's small database")


def run(run: Run) -> Result:
    """Whichever set lies there."""
    flags = run.flags
    data = open_retrieval(run.data, mini=flags.mini)
    kind = "met" if isinstance(data, MetSet) else data.kind
    fit = choose_fit(flags, kind)
    features = functools.partial(fitted_features, run, fit=fit, feature=flags.feature)
    protocol = {
        "feature": flags.feature,
        "sizes": fit.describe(),
        "query_boxes": flags.query_boxes,
        "whitened_to": flags.whiten,
    }
    evaluate = _met if isinstance(data, MetSet) else _ranked
    return evaluate(run, data, features, protocol)


def choose_fit(flags: argparse.Namespace, kind: str) -> Fit:
    """The sizes of `--fit`, `--size` and `--resize`, and of the kind of set what they leave open.

    Raises:
      ValueError: flags that do not go together.
    """
    default = _FITS[kind]
    chosen = flags.fit or default.kind
    if flags.resize is not None and chosen != "crop":
        raise ValueError(f"--resize goes with --fit crop, not {chosen}; leave it out")
    if chosen == "native":
        return Fit(kind=chosen, size_px=flags.size)
    size = flags.size or 224
    if chosen == "pad":
        return Fit(kind=chosen, size_px=size)
    return Fit(kind=chosen, size_px=size, resize_px=flags.resize or max(256, size))


def _ranked(run: Run, data: RetrievalSet, features, protocol: dict[str, Any]) -> Result:
    """Mean average precision at every level of difficulty."""
    if run.flags.query_boxes and None in data.boxes:
        raise ValueError(f"--query-boxes: not every query of {run.data} has a box; leave it out")
    boxes = data.boxes if run.flags.query_boxes else None
    database = features(data.database, at="the database")
    queries = features(data.queries, boxes=boxes, at="the queries")
    database, queries = whitened(run.flags.whiten, database, queries)
    levels = {
        level: tuple(data.rows(kinds) for kinds in positive_and_junk)
        for level, positive_and_junk in data.levels.items()
    }
    ranks, first = {level: [] for level in levels}, []
    whole = rankings(queries, database, say=run.say, is_shown=run.is_primary)
    for i, order in enumerate(whole):
        first.append(order[:NUM_FOUND].copy())
        for level, (positives, junk) in levels.items():
            ranks[level].append(positive_ranks(order, positives[i], junk[i]))
    metrics, details = {}, {}
    for level, found in ranks.items():
        is_graded = bool(level)
        if is_graded and not any(map(len, found)):
            continue  # a list of one's own may have no hard image
        scores = score_level(found, trapezoid=is_graded)
        suffix = f"_{level}" if level else ""
        metrics[f"map{suffix}"] = 100 * scores.mean_average_precision
        metrics |= {f"p{k}{suffix}": 100 * x for k, x in scores.precisions.items()}
        details[f"average_precision{suffix}"] = scores.average_precisions
    notes = {
        i: "  ".join(
            f"{name.replace('_', ' ')} {values[i]:.3f}"
            for name, values in details.items()
            if values[i] is not None
        )
        for i in range(len(data.queries))
    }
    if not metrics:
        raise ValueError(f"no query of {run.data} has a positive image; each may have some")
    positives, junk = list(levels.values())[-1]  # the hardest
    run.draw(
        lambda: {
            SHEET_FILE: retrieval_sheet(
                queries=data.queries,
                database=data.database,
                orders=first,
                positives=positives,
                junk=junk,
                notes=notes,
            )
        }
    )
    return Result(
        metrics=metrics,
        headline=[name for name in metrics if name.startswith("map")],
        protocol=protocol | {"average_precision": "trapezoids" if is_graded else "steps"},
        counts={"train": len(database), "test": len(queries)},
        details=details,
    )


def _met(run: Run, data: MetSet, features, protocol: dict[str, Any]) -> Result:
    """The Met's classifier, its grid tuned on the validation queries."""
    if run.flags.query_boxes:
        raise ValueError("--query-boxes: the Met has no boxes; leave it out")
    database = features(data.database, at="the database")
    parts = [features(names, at=at) for names, at in ((data.val, "val"), (data.test, "test"))]
    database, *parts = whitened(run.flags.whiten, database, *parts)
    num_classes = len(np.unique(data.database_labels))
    found = []
    for part in parts:
        similarities, rows = search(
            part,
            database,
            k=min(max(MET_NEIGHBORS), len(database)),
            say=run.say,
            is_shown=run.is_primary,
        )
        found.append((similarities, data.database_labels[rows]))
    k, temperature, val_gap = tune_met(*found[0], data.val_labels, num_classes=num_classes)
    predicted, confidences = classify_by_neighbors(
        *found[1], num_classes=num_classes, num_neighbors=k, temperature=temperature
    )
    scores = met_scores(predicted, confidences, data.test_labels)
    orders = rows[:, :NUM_FOUND]  # of the test, which was searched last
    is_right = data.database_labels[orders] == data.test_labels[:, None]
    run.draw(
        lambda: {
            SHEET_FILE: retrieval_sheet(
                queries=data.test,
                database=data.database,
                orders=orders,
                positives=[order[right] for order, right in zip(orders, is_right, strict=True)],
                junk=[()] * len(orders),
                notes={i: f"confidence {x:.2f}" for i, x in enumerate(confidences)},
            )
        }
    )
    return Result(
        metrics={name: 100 * value for name, value in scores.items()} | {"val_gap": 100 * val_gap},
        headline=["gap", "gap_minus", "acc"],
        protocol=protocol | {"neighbors": k, "temperature": temperature},
        counts={
            "train": len(database),
            "val": len(parts[0]),
            "test": len(parts[1]),
            "classes": num_classes,
            "distractors": int((data.test_labels < 0).sum()),
        },
    )


TASK = Task(
    name="retrieval",
    summary="instance retrieval: Oxford, Paris, the Met, AmsterTime, or your own list",
    layout=LAYOUT,
    add_flags=add_flags,
    run=run,
)
