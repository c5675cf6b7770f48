"""The task from the command line: trained, from a file, NYU's head on SUN RGB-D; errors."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2_jax import distributed
from dinov2_jax.convert.safetensors_file import read_safetensors, write_safetensors
from dinov2_jax.evals.__main__ import main
from dinov2_jax.evals.dense.metrics import DEPTH_METRICS
from dinov2_jax.evals.tasks import depth
from tests.evals.dense.small_sets import save_depths, save_pair

QUICK = (
    "--batch-size 2 --threads 2 --iterations 40 --images-per-step 8 --learning-rate 0.05 "
    "--warmup 4 --charts 2"
).split()


TWO_STEPS = "--iterations 2 --warmup 1 --crop 28 28".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_depths(tmp_path_factory.mktemp("data"), num_images=20)


def run(data, out, *flags):
    command = ["depth", "--model", "pixels", "--data", str(data), "--out", str(out)]
    code = main([*command, *QUICK, *flags])
    return json.loads((out / "result.json").read_text()) if code == 0 else code


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return out, run(data, out, "--cached", "--crop", "42", "56", "--range", "0.001", "4")


def test_a_head_learns_how_far_colors_are(trained):
    out, record = trained
    # The mean of 1, 2 and 3 m is 0.82 m from the truth.
    assert record["metrics"]["rmse_linear1"] < 0.5
    assert record["headline"] == ["rmse_linear1", "abs_rel_linear1", "d1_linear1"]
    assert record["counts"] == {"train": 16, "test": 4, "without_depth": 0}
    assert record["protocol"]["depth_range"] == record["protocol"]["judged_range"] == [0.001, 4]
    assert (out / "predictions.png").stat().st_size > 1000


def test_its_file_gives_the_same_result_without_training(data, trained, tmp_path):
    out, record = trained
    again = run(data, tmp_path, "--head", str(out / "head.safetensors"))
    assert again["metrics"] == record["metrics"]


def test_four_layers_with_augmentation(data, tmp_path):
    record = run(data, tmp_path, "--protocol", "linear4", *TWO_STEPS)
    assert np.isfinite(record["metrics"]["rmse_linear4"])
    assert record["protocol"]["layers"] == [0] * 4


def test_images_of_another_size(data, tmp_path, monkeypatch):
    """28 / 42 of 42 x 56 px, trained less a tenth; judged at their own size."""
    tested, trained, truths = set(), [], set()
    predict, fit = depth.predict_depth, depth.fit_head

    def predicted(image, *args, size, **settings):
        tested.add(image.shape[:2])
        truths.add(size)
        return predict(image, *args, size=size, **settings)

    def fitted(model, head, dataset, views, **settings):
        trained.append(views.size_px)
        return fit(model, head, dataset, views, **settings)

    monkeypatch.setattr(depth, "predict_depth", predicted)
    monkeypatch.setattr(depth, "fit_head", fitted)
    record = run(data, tmp_path, "--short-side", "28", "--iterations", "2", "--warmup", "1")
    assert tested == {(28, 37)} and truths == {(42, 56)} and trained == [(25, 33)]
    assert record["protocol"]["short_side_px"] == 28


def test_what_was_trained_on_other_metres_is_not_gone_on_from(data, tmp_path, capsys):
    flags = ["--cached", *TWO_STEPS]
    run(data, tmp_path, *flags)
    (tmp_path / "result.json").unlink()  # as where the test was interrupted
    assert run(data, tmp_path, *flags, "--scale", "500") == 2
    assert "holds the training of another request (dataset_sha256" in capsys.readouterr().err
    assert run(data, tmp_path, *flags)["counts"]["train"] == 16


def test_a_head_for_nyu_is_tested_on_sun(trained, tmp_path):
    """Zero-shot: images at 480 x 640, depth at its own size, above 8 m all the same."""
    root = tmp_path / "sun"
    metres = np.full((500, 700), 9.9, np.float32)
    metres[:, :350] = 2.0
    units = (1000 * metres).astype(np.uint16)
    stored = (units << 3) | (units >> 13)
    save_pair((root, root / "d"), "a", np.full((500, 700, 3), 99, np.uint8), stored)
    (root / "SUNRGBD_val_splits.txt").write_text("a.png d/a.png\n")
    flat, _ = read_safetensors(trained[0] / "head.safetensors")
    head = tmp_path / "as_released.safetensors"
    write_safetensors(head, flat, {})
    record = run(root, tmp_path / "out", "--head", str(head))
    assert record["protocol"]["clip"] == 8
    assert record["protocol"]["judged"] == "eigen"
    assert record["protocol"]["depth_range"] == [0.001, 10]  # NYU's, of which a file says nothing
    assert 2 < record["metrics"]["rmse_linear1"] < 6  # one colour: nothing can be known


def test_errors(data, trained, tmp_path, capsys):
    def error(*flags, data=data):
        assert run(data, tmp_path / "out", *flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    head = str(trained[0] / "head.safetensors")
    assert "is a head for linear1, and not for dpt" in error("--head", head, "--protocol", "dpt")
    assert "none of 4 images has depth between" in error("--head", head, "--scale", "0.1")
    assert "none of 4 images has depth between" in error("--scale", "0.1")
    assert not (tmp_path / "out" / "training.safetensors").exists()  # before any training
    assert "must fit into images of 42 x 56" in error("--crop", "99", "99")
    assert "--range 4 1 must be the smaller depth and" in error("--range", "4", "1")
    assert "'0' must be above 0" in error("--range", "0", "4")
    assert "--holdout 1 must be a share between 0 and 1" in error("--holdout", "1")
    (tmp_path / "empty").mkdir()
    assert "expected: a folder in one of these layouts" in error(data=tmp_path / "empty")
    wrong = save_depths(tmp_path / "wrong")
    Image.fromarray(np.zeros((5, 6), np.uint16)).save(wrong / "depth" / "frame0.png")
    assert "has 56 x 42 pixels and" in error(data=wrong)


def test_a_process_that_tested_no_image_meets_the_others(data, trained, tmp_path, monkeypatch):
    """Where one process draws all must come: it would wait for one that did not."""
    met = []
    monkeypatch.setattr(distributed, "on_primary", met.append)
    errors = dict.fromkeys(DEPTH_METRICS, 1.0)
    monkeypatch.setattr(depth, "evaluate_depths", lambda *_, **__: (errors, 1, []))
    command = ["depth", "--model", "pixels", "--data", str(data), "--out", str(tmp_path)]
    assert main([*command, "--head", str(trained[0] / "head.safetensors")]) == 0
    assert len(met) == 2  # the sheet and the record
