"""The linear probe's grid as tasks use it: its flags, its training, and the best one of it."""

import argparse
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dinov2_jax.arguments import positive
from dinov2_jax.evals.linear_probe import (
    LEARNING_RATES,
    Columns,
    Variant,
    init_probe,
    learning_rates,
)
from dinov2_jax.evals.probe_batches import CachedBatches, probe_pieces, what_for
from dinov2_jax.evals.probe_choice import choose, logits_of
from dinov2_jax.evals.probe_training import STATE_FILE, Batches, train_probe
from dinov2_jax.evals.task import Run
from dinov2_jax.features.read import FeatureSet

NUM_LAYERS = (1, 4)


class LinearClassifier(NamedTuple):
    """One classifier on the features of `probe_what`.

    Attributes:
      name: what it sees, such as "cls4_mean".
      kernel, bias: float32 `[d, c]` and `[c]`.
      seen: the columns that it sees.
    """

    name: str
    kernel: np.ndarray
    bias: np.ndarray
    seen: slice

    def logits(self, features: FeatureSet) -> np.ndarray:
        """`[rows, c]`."""
        return logits_of(self.kernel, self.bias, probe_pieces(features), seen=self.seen)


def add_probe_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the grid's training."""
    add = parser.add_argument
    add("--iterations", type=positive, default=12_500, help="steps of SGD (default 12500)")
    add("--probe-batch-size", type=positive, default=1024, help="rows a step (default 1024)")
    grids = (f"{name}: {', '.join(map(str, rates))}" for name, rates in LEARNING_RATES.items())
    add(
        "--lrs",
        nargs="+",
        default=["paper"],
        metavar="LR",
        help=f"paper (default), code (times batch / 256), or numbers; {'; '.join(grids)}",
    )
    add("--layers", type=positive, nargs="+", metavar="N", help="of the last blocks (default 1 4)")
    add("--save-every", type=positive, default=1250, help="iterations a killed run may lose")


def probe_layers(run: Run) -> list[int]:
    """Numbers of last blocks that classifiers see: those asked for, of which the model has enough.

    Raises:
      ValueError: more blocks were asked for than the model has.
    """
    asked, depth = run.flags.layers, run.model.spec.depth
    if asked and max(asked) > depth:
        raise ValueError(f"--layers {max(asked)} must not exceed the model's {depth} blocks")
    return sorted({n for n in asked or NUM_LAYERS if n <= depth})


def probe_rates(flags: argparse.Namespace) -> tuple[float, ...]:
    """Learning rates of the grid.

    Raises:
      ValueError: they are neither the name of a grid nor numbers above 0.
    """
    grid = flags.lrs[0]
    if grid not in LEARNING_RATES or len(flags.lrs) > 1:
        try:
            grid = [float(text) for text in flags.lrs]
        except ValueError:
            grid = [0.0]
        if min(grid) <= 0:
            raise ValueError(f"--lrs {' '.join(flags.lrs)} must be paper, code or numbers above 0")
    return learning_rates(grid, batch_size=flags.probe_batch_size)


def probe_what(run: Run) -> str:
    """What to extract for the grid."""
    return what_for(max(probe_layers(run)))


def columns_of(features: FeatureSet) -> Columns:
    """How the features of `probe_what` are laid out."""
    _, num_layers, cls_dim = features["layers_cls"].shape
    return Columns(num_layers, cls_dim, features["layers_mean"].shape[-1])


def fit_probe(
    run: Run,
    *,
    train: FeatureSet | None = None,
    train_labels: np.ndarray | None = None,
    batches: Batches | None = None,
    val: FeatureSet,
    val_labels: np.ndarray,
    num_classes: int,
    what: Mapping[str, Any],
) -> tuple[LinearClassifier, dict[str, Any], dict[str, float | None]]:
    """Trains the grid and takes the classifier that is best on `val`.

    Args:
      run: with the flags of `add_probe_flags`.
      train, train_labels: features of `probe_what`, and integers of their rows.
      batches: instead of both; see `probe_batches`.
      val, val_labels: likewise, held out.
      num_classes: of both.
      what: JSON, all that decides the features trained on; a training that was interrupted goes on
        only where it is the same.

    Returns:
      The classifier, settings and choice for the record, and per cent right by grid point.

    Raises:
      ValueError: wrong flags, a state of another training, or every classifier has diverged.
    """
    flags, columns, rates = run.flags, columns_of(val), probe_rates(run.flags)
    layers = probe_layers(run)
    if not flags.layers and layers != list(NUM_LAYERS):
        run.say(f"the model has {run.model.spec.depth} blocks: classifiers see the last alone")
    variants = tuple(Variant(n, has_mean) for n in layers for has_mean in (False, True))
    if batches is None:
        what = {**what, "labels": np.asarray(train_labels).tolist()}
        batches = CachedBatches(train, train_labels, seed=run.seed)
    of = json.dumps(what, sort_keys=True)
    settings = {
        "iterations": flags.iterations,
        "batch_size": flags.probe_batch_size,
        "learning_rates": list(rates),
        "classifiers": [variant.name for variant in variants],
        "seed": run.seed,
        "features_sha256": hashlib.sha256(of.encode()).hexdigest(),
    }
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
    params = jax.device_get(state.params)
    grid, (i, j) = choose(
        params, probe_pieces(val), val_labels, variants=variants, columns=columns, rates=rates
    )
    best = params[variants[i].name]
    classifier = LinearClassifier(
        variants[i].name, best["kernel"][:, j], best["bias"][j], columns.of(variants[i])
    )
    chosen = {"classifier": classifier.name, "learning_rate": rates[j]}
    return classifier, {**chosen, **settings}, grid
