"""Resuming bit for bit, other settings, and several devices."""

import jax
import numpy as np
import pytest

from dinov2_jax.evals import probe_training
from dinov2_jax.evals.linear_probe import Columns, Variant, init_probe
from dinov2_jax.evals.probe_training import train_probe
from dinov2_jax.sharding import make_mesh

COLUMNS, VARIANTS, RATES = Columns(2, 4, 3), (Variant(1, True), Variant(2, False)), (0.1, 0.5)
STEPS, BATCH = 20, 16
SETTINGS = {"iterations": STEPS, "learning_rates": RATES}


class Interrupted(Exception):
    pass


def batches(positions, *, last=np.inf):
    """Features that depend on the position alone."""
    if positions.max() > last:
        raise Interrupted
    rng = [np.random.default_rng(p) for p in positions.ravel().tolist()]
    features = np.stack([r.standard_normal(COLUMNS.width).astype(np.float32) for r in rng])
    return features.reshape(*positions.shape, -1), (positions % 3).astype(np.int32)


def train(file, batches=batches, **changes):
    start = init_probe(
        jax.random.key(0), VARIANTS, columns=COLUMNS, num_rates=len(RATES), num_classes=3
    )
    arguments = dict(
        rates=RATES,
        variants=VARIANTS,
        columns=COLUMNS,
        total_steps=STEPS,
        batch_size=BATCH,
        file=file,
        settings=SETTINGS,
        save_every=3,
    )
    return train_probe(start, batches, **arguments | changes)


@pytest.fixture(autouse=True)
def few_steps_at_once(monkeypatch):
    monkeypatch.setattr(probe_training, "_MAX_STEPS_AT_ONCE", 2)


def test_an_interrupted_training_ends_as_the_whole_one(tmp_path, capsys):
    whole = train(tmp_path / "whole.safetensors")
    assert int(whole.step) == STEPS
    capsys.readouterr()
    with pytest.raises(Interrupted):
        train(tmp_path / "part.safetensors", lambda p: batches(p, last=13 * BATCH))
    resumed = train(tmp_path / "part.safetensors")
    assert "12 of 20 iterations are done: going on" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    # Complete: no batch is read any more.
    again = train(tmp_path / "part.safetensors", lambda _: 1 / 0)
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_a_state_of_other_settings_is_not_gone_on_with(tmp_path):
    file = tmp_path / "state.safetensors"
    train(file)
    other = SETTINGS | {"learning_rates": (0.1, 0.2)}
    with pytest.raises(ValueError, match=r"learning_rates: \[0.1, 0.5\] -> \[0.1, 0.2\].*--force"):
        train(file, settings=other)
    assert int(train(file, settings=other, anew=True).step) == STEPS
    file.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"is damaged .*delete it.*--force to begin anew"):
        train(file)
    assert int(train(file, anew=True).step) == STEPS


def test_eight_devices_agree_with_one(tmp_path, monkeypatch):
    eight = train(tmp_path / "eight.safetensors")
    one_mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(probe_training, "make_mesh", lambda: one_mesh)
    one = train(tmp_path / "one.safetensors")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eight.params, one.params)
    uneven = train(tmp_path / "uneven.safetensors", batch_size=6)
    assert np.isfinite(uneven.params["cls1_mean"]["kernel"]).all()


def test_each_host_reads_its_own_columns(tmp_path):
    """On one host all: the positions are those of step * batch + column, once each."""
    seen = []

    def record(positions):
        seen.append(positions)
        return batches(positions)

    train(tmp_path / "state.safetensors", record)
    expected = np.arange(STEPS * BATCH).reshape(STEPS, BATCH)
    np.testing.assert_array_equal(np.concatenate(seen), expected)
