"""The retrieval command on small sets whose answers are known: raw pixels find copies."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.evals import search
from dinov2_jax.evals.__main__ import main
from dinov2_jax.evals.fitted import Fit, FittedSource, cut_box, open_exactly, pad_to_square
from dinov2_jax.evals.tasks import retrieval


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth picture: copies stay similar when they are resized."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def write(path, image) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path.name


@pytest.fixture
def pairs(tmp_path):
    """AmsterTime's layout: six pairs, the old ones darker."""
    for i in range(6):
        image = blobs(i, 40, 50 + 2 * i)
        write(tmp_path / "data" / "new" / f"{i}.png", image)
        write(tmp_path / "data" / "old" / f"{i}.png", (0.8 * image).astype(np.uint8))
    return tmp_path / "data"


def run(data, out, *flags):
    code = main(
        ["retrieval", "--model", "pixels:7", "--data", str(data), "--out", str(out)]
        + [str(x) for x in ("--batch-size", 1, "--threads", 2, *flags)]
    )
    record = json.loads((out / "result.json").read_text()) if code == 0 else None
    return code, record


@pytest.mark.parametrize(
    "flags", [("--size", 28, "--resize", 30), ("--fit", "pad", "--size", 28), ("--fit", "native")]
)
def test_pairs_are_found(pairs, tmp_path, flags):
    code, record = run(pairs, tmp_path / "out", *flags)
    assert code == 0
    assert record["metrics"]["map"] == record["metrics"]["p1"] == 100
    assert record["counts"] == {"train": 6, "test": 6}
    with Image.open(tmp_path / "out" / "retrieval.png") as sheet:
        assert sheet.width > 8 * 100


def test_how_many_queries_are_ranked_at_once_changes_nothing(pairs, tmp_path, monkeypatch):
    """One after the other; the new pictures stand for each other's junk and hard images."""
    new = [f"new/{i}.png" for i in range(6)]
    queries = [
        {"image": f"old/{i}.png", "easy": [new[i]], "hard": [new[i - 1]], "junk": [new[i - 2]]}
        for i in range(6)
    ]
    (pairs / "list.json").write_text(json.dumps({"database": new, "queries": queries}))
    _, together = run(pairs, tmp_path / "out", "--size", 28)
    monkeypatch.setattr(search, "_RANKED_BYTES", 1)
    _, alone = run(pairs, tmp_path / "out2", "--size", 28)
    for key in ("metrics", "details"):
        assert alone[key] == together[key]
    assert set(together["headline"]) == {"map_easy", "map_medium", "map_hard"}
    assert 0 < together["metrics"]["map_hard"] < 100
    sheets = ((tmp_path / out / "retrieval.png").read_bytes() for out in ("out", "out2"))
    assert next(sheets) == next(sheets)


def test_two_features_side_by_side(pairs, tmp_path, capsys):
    """CLS of pixels is 32 x 32, the mean patch 7 x 7, of three colours."""
    code, record = run(pairs, tmp_path / "out", "--size", 28, "--feature", "cls,mean")
    assert code == 0 and record["metrics"]["map"] > 50
    assert f"width {3 * (32**2 + 7**2):,}:" in capsys.readouterr().out


def test_a_list_with_levels_and_boxes(pairs, tmp_path):
    """Of two positives, the copy is easy; a picture of another kind is hard, and comes last."""
    new = [f"data/new/{i}.png" for i in range(6)]
    query = {"image": "data/old/0.png", "easy": [new[0]], "hard": [new[5]], "box": [5, 5, 45, 35]}
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"database": new, "queries": [query]}))
    code, record = run(path, tmp_path / "out", "--size", 28, "--query-boxes", "--whiten", 3)
    assert code == 0
    assert record["metrics"]["map_easy"] == 100
    assert record["protocol"]["whitened_to"] == 3
    assert record["details"]["average_precision_easy"] == [1.0]
    query.pop("box")
    path.write_text(json.dumps({"database": new, "queries": [query]}))
    assert run(path, tmp_path / "out2", "--size", 28, "--query-boxes")[0] == 2
    # Where no image is hard, that level is left out.
    query["easy"] += query.pop("hard")
    path.write_text(json.dumps({"database": new, "queries": [query]}))
    code, record = run(path, tmp_path / "out3", "--size", 28)
    assert code == 0 and record["headline"] == ["map_easy", "map_medium"]


def test_met(tmp_path, pairs, monkeypatch):
    drawn, draw = {}, retrieval.retrieval_sheet

    def watched(**given):
        drawn.update(given, positives=[x.tolist() for x in given["positives"]])
        return draw(**given)

    monkeypatch.setattr(retrieval, "retrieval_sheet", watched)
    records = {"MET_database": [], "valset": [], "testset": []}
    for i in range(6):
        records["MET_database"].append({"path": f"new/{i}.png", "id": 100 + i})
        key = "valset" if i < 2 else "testset"
        records[key].append({"path": f"old/{i}.png", "MET_id": 100 + i})
    records["testset"][3].pop("MET_id")
    for name, entries in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    (tmp_path / "images").symlink_to(pairs)
    code, record = run(tmp_path, tmp_path / "out", "--fit", "crop", "--size", 28)
    assert code == 0
    assert record["metrics"]["gap_minus"] == record["metrics"]["acc"] == 100
    assert record["counts"]["distractors"] == 1 and record["counts"]["classes"] == 6
    assert [drawn[name] for name in ("queries", "positives", "junk")] == [
        [str(tmp_path / f"images/old/{i}.png") for i in range(2, 6)],
        [[2], [3], [4], []],  # the last is a distractor: its photo is there, its object is not
        [()] * 4,
    ]
    assert drawn["notes"].keys() == {0, 1, 2, 3} and drawn["notes"][0].startswith("confidence 0.")
    assert (tmp_path / "out" / "retrieval.png").stat().st_size > 1000


def test_errors_are_one_line(pairs, tmp_path, capsys):
    assert run(pairs, tmp_path / "out", "--fit", "pad", "--resize", 40)[0] == 2
    assert "--resize goes with --fit crop, not pad" in capsys.readouterr().err
    assert run(pairs, tmp_path / "out", "--size", 28, "--whiten", 6)[0] == 2
    assert "between 1 and the 5 directions" in capsys.readouterr().err
    bad = pairs / "new" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    assert run(pairs, tmp_path / "new", "--size", 28)[0] == 2
    error = capsys.readouterr().err
    assert "new/3.png" in error and "cannot be read" in error and error.count("\n") == 1
    bad.write_bytes(b"")
    assert run(pairs, tmp_path / "new", "--size", 28)[0] == 2
    assert "3.png: zero bytes" in capsys.readouterr().err


def test_padding_keeps_the_aspect_and_is_the_mean():
    image = np.full((20, 40, 3), 200, np.uint8)
    padded = pad_to_square(image, 16, (0.5, 0.4, 0.2))
    assert padded.shape == (16, 16, 3)
    assert (padded[4:12] == 200).all()
    assert (padded[:4] == [128, 102, 51]).all() and (padded[12:] == [128, 102, 51]).all()


def test_native_sides_are_whole_patches(tmp_path):
    names = [str(tmp_path / write(tmp_path / "a.png", blobs(0, 31, 63)))]
    source = open_exactly(names, at="list")
    settings = dict(mean=(0.5,) * 3, patch_size=7)
    for size, expected in ((None, (28, 63)), (40, (21, 42)), (3, (7, 7))):
        fitted = FittedSource(source, Fit(kind="native", size_px=size), **settings)
        assert fitted.shape(0) == fitted[0].image.shape[:2] == expected
    boxed = FittedSource(source, Fit(kind="native"), boxes=[(1.4, 2, 15.3, 30)], **settings)
    assert boxed.shape(0) == boxed[0].image.shape[:2] == (28, 14)
    np.testing.assert_array_equal(cut_box(np.arange(24).reshape(4, 6, 1), (1, 2, 3, 4))[0, 0], [13])
    with pytest.raises(ValueError, match=r"box \[0, 0, 7, 2\] does not lie in its 6 x 4 px"):
        cut_box(np.zeros((4, 6, 1)), (0, 0, 7, 2))
