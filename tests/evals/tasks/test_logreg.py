"""Logistic regression from the command line: choice on held-out images, refit, metrics."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dinov2_jax.evals.__main__ import main
from dinov2_jax.evals.feature_cache import cached_features
from dinov2_jax.evals.logistic import C_GRID
from dinov2_jax.evals.tasks import logreg
from tests.evals.conftest import read

GRID = tuple(C_GRID[i] for i in (8, 20, 30))


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    monkeypatch.setattr(logreg, "C_GRID", GRID)


def test_choice_and_refit_are_scikit_learns(arguments, model, colors, tmp_path, monkeypatch):
    assert main(["logreg", *arguments]) == 0
    record = read(tmp_path)
    sets = [
        cached_features(
            model,
            str(colors / split),
            tmp_path / "again",
            resize_size_px=12,
            crop_size_px=12,
            quiet=True,
        )
        for split in ("train", "val", "test")
    ]
    (x, y), (xv, yv), (xt, yt) = (
        (np.asarray(s["cls"], np.float64), np.asarray(s.labels)) for s in sets
    )

    def fit(c, x, y):
        return LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x, y)

    sweep = {f"{c:.6g}": 100 * fit(c, x, y).score(xv, yv) for c in GRID}
    assert record["details"]["sweep"] == pytest.approx(sweep)
    best = max(GRID, key=lambda c: (sweep[f"{c:.6g}"], -c))
    assert record["protocol"]["best_c"] == best and record["protocol"]["held_out"] == "val"
    expected = fit(best, np.concatenate([x, xv]), np.concatenate([y, yv])).score(xt, yt)
    assert record["metrics"]["top1"] == pytest.approx(100 * expected)
    assert record["counts"] == {"train": 36, "test": 12, "classes": 3}
    assert record["headline"] == ["top1"]


def test_a_tenth_of_train_where_there_is_no_val(arguments, colors, tmp_path):
    assert main(["logreg", *arguments, "--split=val"]) == 0
    record = read(tmp_path)
    assert record["protocol"]["held_out"] == "1 of 10 of train"
    assert record["counts"]["train"] == 24 and record["counts"]["test"] == 12
    sweep = tmp_path / "out" / "sweep.json"
    first = json.loads(sweep.read_text())["request"]["data_sha256"]
    assert main(["logreg", *arguments, "--split=val", "--seed=1", "--force"]) == 0
    assert json.loads(sweep.read_text())["request"]["data_sha256"] != first  # another tenth


def test_the_metric_of_a_data_set(arguments, tmp_path):
    assert main(["logreg", *arguments, "--dataset=pets"]) == 0
    record = read(tmp_path)
    assert record["headline"] == ["mean_per_class"]
    assert record["metrics"]["mean_per_class"] == pytest.approx(
        np.mean(list(record["details"]["per_class"].values()))
    )


def test_a_fit_that_stopped_before_its_end_is_said(arguments, tmp_path, monkeypatch, capsys):
    fit_grid = logreg.fit_grid

    def in_haste(*data, **settings):
        return fit_grid(*data, **settings, max_iterations=2)

    monkeypatch.setattr(logreg, "fit_grid", in_haste)
    assert main(["logreg", *arguments]) == 0
    said = capsys.readouterr().out
    assert f"C {GRID[-1]:.3g} has not converged: gradient " in said
    assert f"C {GRID[0]:.3g} has not" not in said  # its optimum is next to where it starts


def test_the_sweep_goes_on_where_it_was(arguments, tmp_path, monkeypatch):
    fit_grid, asked = logreg.fit_grid, []

    def interrupted(features, targets, grid, **settings):
        asked.append(list(grid))
        for i, fitted in enumerate(fit_grid(features, targets, grid, **settings)):
            if len(asked) == 1 and i == 1:
                raise KeyboardInterrupt
            yield fitted

    monkeypatch.setattr(logreg, "fit_grid", interrupted)
    assert main(["logreg", *arguments]) == 130
    assert main(["logreg", *arguments]) == 0
    assert asked[:2] == [list(GRID), list(GRID[1:])] and len(asked[2]) == 1
    (tmp_path / "out" / "sweep.json").write_text("{")
    assert main(["logreg", *arguments, "--force"]) == 2


def test_several_classes_an_image(cache, model_path, colors, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val", "test"):
        (data / split).symlink_to(colors / split)
        labels = {
            f"{split}/{name}/{i}.png": [name, "warm"] if name == "red" else [name]
            for name in ("red", "green", "blue")
            for i in range(4)
        }
        (data / f"{split}.json").write_text(json.dumps(labels))
    out = ["--model", str(model_path), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(["logreg", *out]) == 0
    record = read(tmp_path)
    assert record["headline"] == ["map_11_point"] and record["metrics"]["map_11_point"] > 60
    precision = record["details"]["average_precision"]
    assert precision["warm"] == pytest.approx(precision["red"], abs=1e-6)
    assert record["counts"] == {"train": 24, "test": 12, "classes": 4}
    assert (tmp_path / "out" / "per_class.png").stat().st_size > 1000
    assert main(["logreg", *out, "--metric=top1", "--force"]) == 2
    (data / "test.json").write_text(json.dumps({f"test/red/{i}.png": ["?red"] for i in range(4)}))
    capsys.readouterr()
    assert main(["logreg", *out, "--force"]) == 2
    assert "test.json must have an image with a class; a folder with" in capsys.readouterr().err


def test_the_sweep_of_other_labels_is_made_again(cache, model_path, colors, tmp_path):
    """Of the same images: a class that was wrong in the file is put right."""
    data = tmp_path / "data"
    data.mkdir()
    names = ("red", "green", "blue")

    def label(turn: int) -> dict[str, float]:
        for split in ("train", "val", "test"):
            labels = {
                f"{split}/{name}/{i}.png": [names[(number + turn * i) % 3]]
                for number, name in enumerate(names)
                for i in range(4)
            }
            (data / f"{split}.json").write_text(json.dumps(labels))
        out = ["--model", str(model_path), "--data", str(data), "--out", str(tmp_path / "out")]
        assert main(["logreg", *out, "--force"]) == 0
        return read(tmp_path)["details"]["sweep"]

    for split in ("train", "val", "test"):
        (data / split).symlink_to(colors / split)
    mixed, right = label(1), label(0)
    assert max(right.values()) > max(mixed.values())


def test_help_has_its_own_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["logreg", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "tested; default: test, or val where there is no test" in text
    assert "short side; default: --crop --crop PX centred crop" in text


def test_wrong_input_is_one_line(arguments, capsys):
    assert main(["logreg", *arguments, "--dataset=voc07"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "metric map_11_point of voc07 must be" in error
