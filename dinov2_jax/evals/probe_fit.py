"""The linear probe's grid as other tasks use it: trained on cached features, the best one kept."""

import argparse
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dinov2_jax.evals.command import positive
from dinov2_jax.evals.linear_probe import (
    Columns,
    Variant,
    init_probe,
    learning_rates,
)
from dinov2_jax.evals.probe_batches import CachedBatches, probe_pieces, what_for
from dinov2_jax.evals.probe_choice import choose, logits_of
from dinov2_jax.evals.probe_training import STATE_FILE, train_probe
from dinov2_jax.evals.task import Run
from dinov2_jax.features.read import FeatureSet

NUM_LAYERS = (1, 4)


class LinearClassifier(NamedTuple):
    """One classifier on the features of `what_for`.

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
        classifiers = {"kernel": self.kernel[:, None], "bias": self.bias[None]}
        return logits_of(classifiers, 0, probe_pieces(features), seen=self.seen)


def add_probe_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the grid's training."""
    add = parser.add_argument
    add("--iterations", type=positive, default=12_500, help="steps of SGD (default 12500)")
    add("--probe-batch-size", type=positive, default=1024, help="rows a step (default 1024)")
    add("--lrs", choices=("paper", "code"), default="paper", help="learning rates of the grid")


def probe_what(run: Run) -> str:
    """What to extract for the grid: the last four layers, or as many as there are."""
    return what_for(min(max(NUM_LAYERS), run.model.spec.depth))


def columns_of(features: FeatureSet) -> Columns:
    """How the features of `probe_what` are laid out."""
    _, num_layers, cls_dim = features["layers_cls"].shape
    return Columns(num_layers, cls_dim, features["layers_mean"].shape[-1])


def fit_probe(
    run: Run,
    *,
    train: FeatureSet,
    train_labels: np.ndarray,
    val: FeatureSet,
    val_labels: np.ndarray,
    num_classes: int,
    what: Mapping[str, Any],
) -> tuple[LinearClassifier, dict[str, Any], dict[str, Any]]:
    """Trains the grid and takes the classifier that is best on `val`.

    Args:
      run: with the flags of `add_probe_flags`.
      train, val: features of `probe_what`.
      train_labels, val_labels: integers of their rows.
      num_classes: of both.
      what: JSON, all that decides the features; a training that was interrupted goes on only
        where it is the same.

    Returns:
      The classifier, settings and choice for the record, and per cent right by grid point.
    """
    flags, columns = run.flags, columns_of(train)
    layers = sorted({n for n in NUM_LAYERS if n <= columns.num_layers})
    variants = tuple(Variant(n, has_mean) for n in layers for has_mean in (False, True))
    rates = learning_rates(flags.lrs, batch_size=flags.probe_batch_size)
    settings = {
        "iterations": flags.iterations,
        "batch_size": flags.probe_batch_size,
        "learning_rates": list(rates),
        "classifiers": [variant.name for variant in variants],
        "seed": run.seed,
    }
    of = json.dumps({**what, "labels": np.asarray(train_labels).tolist()}, sort_keys=True)
    state = train_probe(
        init_probe(
            jax.random.key(run.seed),
            variants,
            columns=columns,
            num_rates=len(rates),
            num_classes=num_classes,
        ),
        CachedBatches(train, train_labels, seed=run.seed),
        rates=rates,
        variants=variants,
        columns=columns,
        total_steps=flags.iterations,
        batch_size=flags.probe_batch_size,
        file=run.out / STATE_FILE,
        settings=settings | {"features_sha256": hashlib.sha256(of.encode()).hexdigest()},
        anew=flags.force,
        is_primary=run.is_primary,
    )
    params = jax.device_get(state.params)
    grid, best = choose(
        params, probe_pieces(val), val_labels, variants=variants, columns=columns, rates=rates
    )
    variant, rate = variants[best[0]], best[1]
    classifier = LinearClassifier(
        variant.name,
        params[variant.name]["kernel"][:, rate],
        params[variant.name]["bias"][rate],
        columns.of(variant),
    )
    chosen = {"classifier": variant.name, "learning_rate": rates[rate]}
    return classifier, {**chosen, **settings}, grid
