"""The task from the command line: trained, from a file, by votes; what goes wrong is one line."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2_jax import distributed
from dinov2_jax.evals.__main__ import main
from dinov2_jax.evals.tasks import segmentation
from tests.evals.dense.small_sets import save_masks

QUICK = (
    "--short-side 42 --batch-size 4 --threads 2 --iterations 40 --images-per-step 8 "
    "--learning-rate 0.05 --charts 2"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_masks(tmp_path_factory.mktemp("data"))


def run(data, out, *flags):
    command = ["segmentation", "--model", "pixels", "--data", str(data), "--out", str(out)]
    code = main([*command, *QUICK, *flags])
    return json.loads((out / "result.json").read_text()) if code == 0 else code


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return out, run(data, out, "--cached", "--cache", str(out.parent / "cache"))


def test_a_head_learns_colors(trained):
    out, record = trained
    assert record["metrics"]["miou_linear"] > 80
    assert record["headline"] == ["miou_linear"]
    assert record["counts"] == {"train": 6, "test": 3, "classes": 3}
    assert record["protocol"]["stride_px"] == round(42 * 341 / 512)
    assert list(record["details"]["iou"]) == ["0", "1", "2"]
    for file in ("predictions.png", "confusion.png", "per_class.png"):
        assert (out / file).stat().st_size > 1000
    # A row of each mask is ignored.
    assert sum(map(sum, record["details"]["confusion"])) == 3 * 41 * 56


def test_its_file_gives_the_same_result_without_training(data, trained, tmp_path):
    out, record = trained
    again = run(data, tmp_path, "--head", str(out / "head.safetensors"))
    assert again["metrics"] == record["metrics"]
    assert again["counts"]["train"] == 0


def test_augmented_views_and_several_sizes(data, tmp_path):
    flags = ["--protocol", "ms", "--ratios", "1", "1.5", "--iterations", "12"]
    record = run(data, tmp_path, *flags)
    assert record["metrics"]["miou_ms"] > 40
    assert record["protocol"]["flip"] and record["protocol"]["ratios"] == [1, 1.5]


@pytest.mark.parametrize("vote", ["weighted", "majority"])
def test_votes_need_no_training(data, tmp_path, vote):
    flags = ["--protocol", "knn", "--neighbors", "5", "--vote", vote, "--bank-patches", "60"]
    record = run(data, tmp_path, *flags)
    assert record["metrics"]["miou_knn"] > 80
    assert record["protocol"]["bank_patches"] == 60
    assert not (tmp_path / "head.safetensors").exists()


def test_errors(data, trained, tmp_path, capsys):
    def error(*flags):
        assert run(data, tmp_path, *flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    head = str(trained[0] / "head.safetensors")
    assert "is a head for linear, and not for ms" in error("--head", head, "--protocol", "ms")
    assert "--neighbors 50 must not exceed the 6" in error(
        "--protocol", "knn", "--neighbors", "50", "--bank-patches", "6"
    )
    assert "stride 43 px must not exceed the crop of 42 px" in error("--stride", "43")
    assert "'0' must be above 0" in error("--ratios", "1", "0")
    assert "'0' must be above 0" in error("--learning-rate", "0")
    assert "'-1' must be a whole number, at least 0" in error("--charts", "-1")
    assert "'-1' must be a whole number, at least 0" in error("--ignore", "-1")
    assert "holds no split nothing" in error("--split", "nothing", "--head", head)
    assert "holds no split nothing" in error("--split", "nothing")
    assert not (tmp_path / "training.safetensors").exists()  # before any training
    assert "must not exceed the short side of 42" in error("--cached", "--crop", "56")
    assert "No such file" in error("--head", str(tmp_path / "none"))
    (tmp_path / "three").write_text("a\nb\n")
    assert "holds [2], and the 2 classes" in error("--classes", str(tmp_path / "three"))


def test_a_test_without_a_labelled_pixel_is_an_error(trained, tmp_path, capsys):
    blank = save_masks(tmp_path / "blank", num_val=1)
    Image.fromarray(np.full((42, 56), 255, np.uint8)).save(blank / "valannot" / "val0.png")
    assert run(blank, tmp_path / "out", "--head", str(trained[0] / "head.safetensors")) == 2
    assert "no pixel of the tested images has a class; look at --ignore" in capsys.readouterr().err


def test_a_process_that_tested_no_image_meets_the_others(data, trained, tmp_path, monkeypatch):
    """Where one process draws all must come: it would wait for one that did not."""
    met = []
    monkeypatch.setattr(distributed, "on_primary", met.append)
    monkeypatch.setattr(
        segmentation, "evaluate_masks", lambda *_, **__: (np.eye(3, dtype=np.int64), [])
    )
    command = ["segmentation", "--model", "pixels", "--data", str(data), "--out", str(tmp_path)]
    assert main([*command, "--head", str(trained[0] / "head.safetensors")]) == 0
    assert len(met) == 2  # the sheet and the record
