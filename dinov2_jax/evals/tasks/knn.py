"""k-NN of CLS features: `python -m dinov2_jax.evals knn`. Protocol: dinov2/eval/knn.py."""

import argparse
import functools

from dinov2_jax.evals.knn import knn_accuracy
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.search import search
from dinov2_jax.evals.splits import LAYOUT, add_crop_flags, labels_like, open_split, tested
from dinov2_jax.evals.task import Run, Task, require_labels


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    add_crop_flags(parser)
    parser.add_argument(
        "--neighbors",
        type=int,
        nargs="+",
        default=[10, 20, 100, 200],
        metavar="K",
        help="numbers of voters; the best is reported beside each (default 10 20 100 200)",
    )
    parser.add_argument("--temperature", type=float, default=0.07, help="of the vote")


def run(run: Run) -> Result:
    """Every k at once."""
    flags = run.flags
    sizes = {"resize_size_px": flags.resize, "crop_size_px": flags.crop}
    bank = run.features(open_split(run.data, ("train",)), **sizes)
    queries = run.features(open_split(run.data, tested(flags)), **sizes)
    bank_labels = require_labels(bank, at=f"train of {run.data}", layout=LAYOUT)
    query_labels = labels_like(
        require_labels(queries, at=f"the tested split of {run.data}", layout=LAYOUT),
        label_names=queries.label_names,
        of=bank.label_names,
        at="the tested split",
    )
    accuracy = knn_accuracy(
        bank_features=bank["cls"],
        bank_labels=bank_labels,
        query_features=queries["cls"],
        query_labels=query_labels,
        num_neighbors=flags.neighbors,
        temperature=flags.temperature,
        search=functools.partial(search, say=run.say, is_shown=run.is_primary),
    )
    best = max(accuracy, key=accuracy.get)
    metrics = {f"top1_k{k}": 100 * value for k, value in accuracy.items()}
    return Result(
        metrics={"top1": 100 * accuracy[best], **metrics},
        headline=["top1"],
        protocol={"feature": "cls", "best_k": best, **bank_sizes(bank.index)},
        counts={
            "train": len(bank),
            "test": len(queries),
            "classes": len(bank.label_names),
        },
    )


def bank_sizes(index) -> dict[str, int]:
    """What size the images had, for the record."""
    return {key: index[key] for key in ("resize_size_px", "crop_size_px")}


TASK = Task(
    name="knn",
    summary="weighted k-nearest neighbours of CLS features",
    layout=LAYOUT,
    add_flags=add_flags,
    run=run,
)
