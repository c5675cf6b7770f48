"""k-NN of CLS features: `python -m dinov2_jax.evals knn`. Protocol: dinov2/eval/knn.py."""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dinov2_jax.arguments import positive, positive_number
from dinov2_jax.evals.classes import report_classes
from dinov2_jax.evals.knn import few_shot_rows, knn_ranking
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.scores import top_k_accuracy
from dinov2_jax.evals.search import search
from dinov2_jax.evals.splits import (
    LAYOUT,
    add_crop_flags,
    crop_sizes,
    image_sizes,
    labels_like,
    open_split,
    tested,
)
from dinov2_jax.evals.task import Run, Task, require_labels

NEIGHBORS = (10, 20, 100, 200)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    add_crop_flags(parser)
    parser.add_argument(
        "--neighbors",
        type=positive,
        nargs="+",
        default=list(NEIGHBORS),
        metavar="K",
        help="numbers of voters; the best is reported beside each (default 10 20 100 200)",
    )
    parser.add_argument(
        "--temperature",
        type=positive_number,
        default=0.07,
        metavar="X",
        help="of the vote (default 0.07)",
    )
    parser.add_argument(
        "--shots",
        type=positive,
        nargs="+",
        default=[],
        metavar="N",
        help="also with N images of each class alone, mean over the tries",
    )
    parser.add_argument(
        "--tries", type=positive, default=1, help="draws of those images, all by --seed"
    )


def run(run: Run) -> Result:
    """Every k at once, of all images and of a few."""
    flags = run.flags
    sizes = crop_sizes(flags)
    bank = run.features(open_split(run.data, ("train",)), **sizes)
    queries = run.features(open_split(run.data, tested(flags)), **sizes)
    bank_labels = require_labels(bank, at=f"train of {run.data}", layout=LAYOUT)
    query_labels = labels_like(
        require_labels(queries, at=f"the tested split of {run.data}", layout=LAYOUT),
        label_names=queries.label_names,
        of=bank.label_names,
        at="the tested split",
    )
    bank_features = bank["cls"]
    rank = functools.partial(
        knn_ranking, query_features=queries["cls"], temperature=flags.temperature
    )
    voters = [k for k in flags.neighbors if k <= len(bank)] or [len(bank)]
    if voters != flags.neighbors:
        run.say(f"the bank has {len(bank)} images: k is {', '.join(map(str, voters))}")
    ranked = rank(
        bank_features=bank_features,
        bank_labels=bank_labels,
        num_neighbors=voters,
        search=functools.partial(search, say=run.say, is_shown=run.is_primary),
    )
    metrics, best = _metrics(ranked, query_labels)
    protocol = {"feature": "cls", "best_k": best, **image_sizes(bank.index)}
    headline = ["top1", "top5"] if len(bank.label_names) > 5 else ["top1"]
    for shots in flags.shots:
        found = _few_shot(rank, bank_features, bank_labels, query_labels, shots=shots, flags=flags)
        metrics |= {f"{name}_{shots}_shot": value for name, value in found.items()}
        headline.append(f"top1_{shots}_shot")
    return Result(
        metrics=metrics,
        headline=headline,
        protocol=protocol,
        counts={"train": len(bank), "test": len(queries), "classes": len(bank.label_names)},
        details=report_classes(run, ranked[best][:, 0], query_labels, bank.label_names),
    )


def _metrics(ranked: dict[int, np.ndarray], labels: np.ndarray) -> tuple[dict[str, float], int]:
    """Per cent by name, and the best k; of equals the smallest."""
    top1 = {k: 100 * top_k_accuracy(ranks, labels, 1) for k, ranks in ranked.items()}
    top5 = {k: 100 * top_k_accuracy(ranks, labels, 5) for k, ranks in ranked.items()}
    best = max(sorted(top1), key=top1.get)
    metrics = {"top1": top1[best], "top5": top5[best]}
    for k in ranked:
        metrics |= {f"top1_k{k}": top1[k], f"top5_k{k}": top5[k]}
    return metrics, best


def _few_shot(
    rank: Callable[..., dict[int, np.ndarray]],
    bank_features: np.ndarray,
    bank_labels: np.ndarray,
    query_labels: np.ndarray,
    *,
    shots: int,
    flags: Any,
) -> dict[str, float]:
    """Means over the tries at every k up to `shots`; `top1` is that of the k with the best mean."""
    voters = _few_voters(flags.neighbors, shots)
    tries = []
    for number in range(flags.tries):
        rows = few_shot_rows(bank_labels, shots=shots, seed=(number, flags.seed))
        ranked = rank(
            bank_features=bank_features[rows],
            bank_labels=bank_labels[rows],
            num_neighbors=[min(k, len(rows)) for k in voters],
        )
        tries.append(
            [100 * top_k_accuracy(ranked[min(k, len(rows))], query_labels, 1) for k in voters]
        )
    mean, deviation = np.mean(tries, axis=0), np.std(tries, axis=0)
    best = int(np.argmax(mean))
    found = {f"top1_k{k}": float(value) for k, value in zip(voters, mean, strict=True)}
    return found | {"top1": float(mean[best]), "top1_deviation": float(deviation[best])}


def _few_voters(neighbors: Sequence[int], shots: int) -> list[int]:
    return sorted({k for k in (*neighbors, shots) if k <= shots})


TASK = Task(
    name="knn",
    summary="weighted k-nearest neighbours of CLS features",
    layout=LAYOUT,
    add_flags=add_flags,
    run=run,
    reads_urls=True,
)
