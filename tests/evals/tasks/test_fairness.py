"""The fairness command on coloured squares: one region's pictures are of another kind."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.convert.safetensors_file import write_safetensors
from dinov2_jax.evals.__main__ import main

# A bright half: what the classes are told apart by.
SIDES = {"left": np.s_[:, :14], "right": np.s_[:, 14:], "top": np.s_[:14], "bottom": np.s_[14:]}


def picture(kind, rng):
    image = rng.integers(20, 60, (28, 28, 3))
    image[SIDES[kind]] += 160
    return Image.fromarray(image.astype(np.uint8))


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in SIDES:
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(6):
                picture(kind, rng).save(tmp_path / split / kind / f"{i}.png")
    lines = ["image,concept,income,region,household"]
    for i in range(12):
        # In Africa the third household's picture is not what it is said to be.
        kind = "left" if i % 2 else "right"
        shown = "top" if i == 4 else kind
        picture(shown, rng).save(tmp_path / f"{i}.png")
        region, household = ("af", "h1" if i < 4 else "h2") if i < 6 else ("eu", f"e{i}")
        lines.append(f"{i}.png,{kind},{50 if i < 6 else 5000},{region},{household}")
    (tmp_path / "people.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(data, out, *flags, file="people.csv"):
    command = ["fairness", "--model", "pixels:7", "--data", str(data / file), "--out", str(out)]
    sizes = "--crop 28 --resize 28 --batch-size 4 --threads 2".split()
    code = main([*command, *sizes, *map(str, flags)])
    return code, json.loads((out / "result.json").read_text()) if code == 0 else None


@pytest.fixture
def head(data):
    """One that sees CLS, the 32 x 32 pixels, and knows the four halves: a class ranks first."""
    side = 32
    weight = np.zeros((8, side, side, 3), np.float32)
    for row, place in enumerate((np.s_[:, :16], np.s_[:, 16:], np.s_[:16], np.s_[16:])):
        weight[row][place] = 1
    names = [*SIDES, "a", "b", "c", "d"]  # never ranked before the right half
    bias = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32)
    path = data / "head.safetensors"
    write_safetensors(
        path, {"weight": weight.reshape(8, -1), "bias": bias}, {"classes": json.dumps(names)}
    )
    (data / "meanings.csv").write_text("left,left\nright,right\n")
    return path


def test_a_head_and_both_gaps(data, head, tmp_path, capsys):
    """Top 5 of 8: the half that is bright, and the four that score 1; not the two dark halves."""
    code, record = run(data, tmp_path / "out", "--head", head)
    assert code == 0
    metrics = record["metrics"]
    assert metrics["region_europe"] == metrics["income_high"] == 100
    assert metrics["region_africa"] == pytest.approx(100 * 5 / 6)
    assert metrics["gap_points_region"] == pytest.approx(100 / 6)
    assert metrics["hits_all"] == pytest.approx(100 * 11 / 12)
    assert record["protocol"]["classifier"] == "cls1"
    assert "a gap of 16.7 points, which is 16.7 per cent of the best" in capsys.readouterr().out
    code, record = run(data, tmp_path / "out2", "--head", head, "--by-household")
    assert record["metrics"]["region_africa"] == pytest.approx(100 * (1 + 1 / 2) / 2)


def test_a_classifier_of_a_folder(data, tmp_path, capsys):
    flags = ("--train", data, "--iterations", 40, "--probe-batch-size", 8)
    code, record = run(data, tmp_path / "out", *flags)
    assert code == 0
    # Four classes: the five best are all of them.
    assert record["metrics"]["hits_all"] == 100
    assert record["protocol"]["classifier"].startswith("cls")
    assert "no class means" not in capsys.readouterr().out
    (data / "meanings.csv").write_text("left,left\n")
    assert run(data, tmp_path / "out", *flags, "--force")[0] == 0
    said = capsys.readouterr().out
    assert "no class means 1 of the concepts, such as right: nothing can hit them" in said


def test_associations(data, head, tmp_path):
    lines = ["image,gender,skin,age"]
    lines += [
        f"{i}.png,{'female' if i < 6 else 'male'},{1 + i % 6},{20 + 5 * i}" for i in range(12)
    ]
    (data / "faces.csv").write_text("\n".join(lines) + "\n")
    (data / "meanings.csv").write_text("left,Human\nright,human\ntop,Non-Human\nbottom,crime\n")
    flags = ("--head", head, "--meanings", data / "meanings.csv")
    code, record = run(data, tmp_path / "out", *flags, file="faces.csv")
    assert code == 0
    metrics = record["metrics"]
    # Picture 4, of a woman with skin 5, shows the top.
    assert metrics["human_female_darker"] == pytest.approx(100 * 2 / 3)
    assert metrics["non_human_female_darker"] == pytest.approx(100 / 3)
    assert metrics["human_male_lighter"] == 100 and metrics["crime_all"] == 0
    assert metrics["human_age_30_45"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "give the classifier by --train DIR or by --head FILE"),
        (("--train", ".", "--meanings", "none.csv"), "none.csv is not there; give a file of lines"),
        (("--head", "x", "--columns", "image"), "must be of the form ours=theirs"),
        (("--head", "head.safetensors", "--classes", "meanings.csv"), "there are 2 names"),
        (("--head", "wrong.safetensors"), "sees 7 numbers of an image, but this model has 3072"),
    ],
)
def test_errors(data, head, tmp_path, capsys, flags, message, monkeypatch):
    arrays = {"weight": np.zeros((8, 7), np.float32), "bias": np.zeros(8, np.float32)}
    write_safetensors(data / "wrong.safetensors", arrays, {})
    monkeypatch.chdir(data)
    assert run(data, tmp_path / "out", *flags)[0] == 2
    assert message in capsys.readouterr().err
