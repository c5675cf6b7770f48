"""The grid as tasks use it: which layers and rates, and what of it goes into the record."""

import argparse
import types

import numpy as np
import pytest

from dinov2_jax.evals.feature_cache import cached_features
from dinov2_jax.evals.linear_probe import LEARNING_RATES
from dinov2_jax.evals.probe_fit import (
    add_probe_flags,
    columns_of,
    fit_probe,
    probe_layers,
    probe_rates,
    probe_what,
)


def make_run(*argv: str, depth: int = 12, **more):
    parser = argparse.ArgumentParser()
    add_probe_flags(parser)
    flags = parser.parse_args(argv)
    flags.force = False
    model = types.SimpleNamespace(spec=types.SimpleNamespace(depth=depth))
    return types.SimpleNamespace(
        flags=flags, model=model, seed=0, is_primary=True, say=lambda _: None, **more
    )


@pytest.mark.parametrize(
    ("argv", "depth", "layers"),
    [
        ([], 12, [1, 4]),
        ([], 3, [1]),
        (["--layers", "3", "2", "3"], 3, [2, 3]),
    ],
)
def test_layers(argv, depth, layers):
    run = make_run(*argv, depth=depth)
    assert probe_layers(run) == layers and probe_what(run) == f"cls,layers={layers[-1]}"


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="--layers 4 must not exceed the model's 3 blocks"):
        probe_layers(make_run("--layers", "1", "4", depth=3))


@pytest.mark.parametrize(
    ("argv", "rates"),
    [
        ([], LEARNING_RATES["paper"]),
        (["--lrs", "code", "--probe-batch-size", "512"], [2 * x for x in LEARNING_RATES["code"]]),
        (["--lrs", "0.5", "1e-3"], [0.5, 1e-3]),
    ],
)
def test_rates(argv, rates):
    assert probe_rates(make_run(*argv).flags) == pytest.approx(tuple(rates))


def test_rates_that_are_none():
    for argv in (["slow"], ["paper", "0.1"], ["0"]):
        with pytest.raises(ValueError, match="must be paper, code or numbers above 0"):
            probe_rates(make_run("--lrs", *argv).flags)


def test_a_fit(model, colors, tmp_path):
    train, val = (
        cached_features(model, str(colors / x), tmp_path, what="cls,layers=1", quiet=True)
        for x in ("train", "val")
    )
    assert columns_of(val) == (1, 16, 16)
    run = make_run(
        *"--iterations 30 --probe-batch-size 8 --lrs 0.05 --layers 1".split(), out=tmp_path, depth=3
    )
    common = dict(val=val, val_labels=val.labels, num_classes=3)
    trained_on = dict(train=train, train_labels=train.labels)
    classifier, protocol, grid = fit_probe(run, **trained_on, **common, what={"a": 1})
    accuracy = 100 * (classifier.logits(val).argmax(axis=1) == val.labels).mean()
    assert accuracy == pytest.approx(max(grid.values())) and set(grid) == {
        "cls1 lr=0.05",
        "cls1_mean lr=0.05",
    }
    assert protocol["classifier"] == classifier.name and protocol["learning_rate"] == 0.05
    # Other features, other labels: not gone on with.
    with pytest.raises(ValueError, match="features_sha256"):
        fit_probe(run, **trained_on, **common, what={"a": 2})
    swapped = trained_on | {"train_labels": np.roll(train.labels, 1)}
    with pytest.raises(ValueError, match="features_sha256"):
        fit_probe(run, **swapped, **common, what={"a": 1})
