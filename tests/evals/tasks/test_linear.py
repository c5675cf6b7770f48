"""The linear probe from the command line: learns, chooses, goes on, tests elsewhere."""

import json
import shutil

import numpy as np
import pytest

from dinov2_jax.convert.safetensors_file import read_safetensors
from dinov2_jax.evals import probe_training
from dinov2_jax.evals.__main__ import main
from dinov2_jax.evals.feature_cache import cached_features
from dinov2_jax.evals.probe_batches import probe_features
from tests.evals.conftest import read, write_images

FAST = "--iterations 40 --probe-batch-size 8 --save-every 10 --lrs 0.001 0.05 --layers 1 3".split()


def test_the_best_of_the_grid(arguments, colors, model, tmp_path, capsys):
    assert main(["linear", *arguments, *FAST]) == 0
    # Columns: 16, 32, 48 and 64; a bias each; two rates and three classes.
    num_weights = (16 + 32 + 48 + 64 + 4) * 2 * 3
    assert f"8 classifiers of 3 classes: {num_weights} weights" in capsys.readouterr().out
    record = read(tmp_path)
    grid = record["details"]["grid"]
    assert set(grid) == {
        f"cls{n}{mean} lr={rate}"
        for n in (1, 3)
        for mean in ("", "_mean")
        for rate in (0.001, 0.05)
    }
    assert record["metrics"]["top1"] == max(grid.values()) > 60
    protocol = record["protocol"]
    chosen = f"{protocol['classifier']} lr={protocol['learning_rate']:g}"
    assert grid[chosen] == record["metrics"]["top1"]
    # The file has the best one, in the released layout.
    flat, facts = read_safetensors(tmp_path / "out" / "classifier.safetensors")
    assert json.loads(facts["classes"]) == ["blue", "green", "red"]
    val = cached_features(
        model, str(colors / "val"), tmp_path / "c", what="cls,layers=3", quiet=True
    )
    start = 32 if protocol["classifier"].startswith("cls1") else 0
    features = probe_features(val.arrays)[:, start : start + flat["weight"].shape[1]]
    predicted = (features @ flat["weight"].T + flat["bias"]).argmax(axis=1)
    assert 100 * (predicted == val.labels).mean() == pytest.approx(record["metrics"]["top1"])


def test_killed_and_run_again_is_the_run_that_was_left_alone(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_training, "_MAX_STEPS_AT_ONCE", 5)
    assert main(["linear", *arguments, *FAST]) == 0
    whole = (tmp_path / "out" / "linear_state.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    train_steps = probe_training.train_steps

    def interrupted(state, *rest, **settings):
        if int(state.step) == 25:
            raise KeyboardInterrupt
        return train_steps(state, *rest, **settings)

    monkeypatch.setattr(probe_training, "train_steps", interrupted)
    assert main(["linear", *arguments, *FAST]) == 130
    assert not (tmp_path / "out" / "result.json").exists()
    monkeypatch.setattr(probe_training, "train_steps", train_steps)
    assert main(["linear", *arguments, *FAST, "--iterations=30"]) == 2
    assert main(["linear", *arguments, *FAST]) == 0
    assert (tmp_path / "out" / "linear_state.safetensors").read_bytes() == whole


def test_further_sets_without_training_again(arguments, colors, tmp_path, capsys, monkeypatch):
    assert main(["linear", *arguments, *FAST]) == 0
    write_images(tmp_path / "two", count=3, seed=9, classes=("red", "green"))
    for severity in (1, 2):
        write_images(tmp_path / "c" / "fog" / str(severity), count=2, seed=severity)
    labels = {f"{i}.png": [0, 1, 2] for i in range(4)}
    (tmp_path / "real.json").write_text(json.dumps(labels))
    sets = [
        *("--test", f"two={tmp_path}/two", f"fog={tmp_path}/c:corruptions"),
        f"--test=real={tmp_path}/real.json:label_sets",
    ]
    assert main(["linear", *arguments, *FAST, *sets]) == 2
    assert "holds the result of another request (test: [] -> " in capsys.readouterr().err
    monkeypatch.setattr(probe_training, "train_steps", lambda *_, **__: 1 / 0)
    assert main(["linear", *arguments, *FAST, *sets, "--force"]) == 0
    record = read(tmp_path)
    assert record["headline"] == ["top1", "two/top1", "fog/mce_of_1", "real/top1"]
    assert record["metrics"]["real/top1"] == 100
    assert record["counts"]["two/images"] == 6 and record["counts"]["two/classes"] == 2
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["dataset"], row["metric"], row["images"]) for row in rows] == [
        (colors.name, "top1", 36),
        ("two", "top1", 6),
        ("fog", "mce_of_1", 0),
        ("real", "top1", 12),
    ]


def test_augmented(arguments, tmp_path):
    flags = "--augment --iterations 12 --probe-batch-size 8 --layers 1 --lrs code".split()
    assert main(["linear", *arguments, *flags]) == 0
    record = read(tmp_path)
    assert record["protocol"]["augment"] is True
    assert record["protocol"]["learning_rates"][-1] == pytest.approx(0.1 * 8 / 256)
    assert np.isfinite(record["metrics"]["top1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lrs=fast"], "--lrs fast must be paper, code or numbers above 0"),
        (["--lrs", "0.1", "-1"], "--lrs 0.1 -1 must be"),
        (["--layers=9"], "--layers 9 must not exceed the model's 3 blocks"),
        (["--test=v2"], "--test 'v2' must be NAME=PATH"),
        (["--test=v2=nowhere"], "nothing found at"),
        (["--iterations=0"], "'0' must be a whole number, at least 1"),
        (["--split=train2"], "holds no split train2; expected: a folder with train/"),
    ],
)
def test_wrong_input_is_one_line(arguments, tmp_path, capsys, flags, message):
    assert main(["linear", *arguments, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out" / "linear_state.safetensors").exists()  # before any training
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_model_of_few_blocks(arguments, tmp_path, capsys):
    flags = ["--iterations=2", "--probe-batch-size=4", "--lrs=0.1"]
    assert main(["linear", *arguments, *flags]) == 0
    assert "the model has 3 blocks: classifiers see the last alone" in capsys.readouterr().out
