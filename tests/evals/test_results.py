"""Records and tables: whole, in the paper's units, beside the paper's numbers."""

import csv
import json
import pathlib

import pytest

from dinov2_jax.evals.results import (
    COLUMNS,
    Result,
    entry_name,
    read_record,
    rows,
    to_csv,
    to_markdown,
    write_record,
)

RECORD = {
    "task": "linear",
    "dataset": "imagenet1k",
    "metrics": {"top1": 80.123456, "loss": 1.0, "imagenet_v2/top1": 70.5},
    "headline": ["top1", "imagenet_v2/top1"],
    "counts": {"train": 100, "test": 20, "classes": 7, "imagenet_v2/images": 5},
    "model": {
        "name": "a|b",
        "variant": "vit_small",
        "patch_size": 14,
        "num_register_tokens": 0,
    },
    "seed": 3,
    "seconds": 1.5,
}


def make_result(**changes):
    settings = dict(metrics={"top1": 1.0}, headline=["top1"], protocol={}, counts={})
    return Result(**settings | changes)


def test_a_result_is_consistent():
    assert make_result().details == {}
    with pytest.raises(ValueError, match=r"headline \['top5'\] must be among the metrics \['top1'"):
        make_result(headline=["top5"])
    with pytest.raises(ValueError, match=r"metrics \['top1'\] must be finite; look at"):
        make_result(metrics={"top1": float("nan")})


def test_a_row_for_each_headline():
    found = rows({"mine": RECORD})
    assert [tuple(row) for row in found] == [COLUMNS] * 2
    assert found[0] == {
        "entry": "mine",
        "dataset": "imagenet1k",
        "task": "linear",
        "metric": "top1",
        "value": 80.123456,
        "paper": 81.1,
        "model": "a|b",
        "images": 120,
        "seed": 3,
        "seconds": 1.5,
    }
    assert found[1] | {"dataset": "imagenet_v2", "paper": 70.9, "images": 5} == found[1]
    assert rows({"mine": RECORD | {"headline": []}}) == []
    two = rows({"linear": RECORD, "linear_augmented": RECORD})
    assert [row["entry"] for row in two] == ["linear"] * 2 + ["linear_augmented"] * 2


def test_tables():
    found = rows({"mine": RECORD})
    lines = to_markdown(found).splitlines()
    assert lines[0].count("|") == len(COLUMNS) + 1 and len(lines) == 4
    assert "| 80.1 | 81.1 | a\\|b | 120 | 3 | 1.500 |" in lines[2]
    (first, _) = csv.DictReader(to_csv(found).splitlines())
    assert first["value"] == "80.123456" and first["model"] == "a|b"
    record = RECORD | {"dataset": "cats", "headline": ["loss"]}
    empty = to_csv(rows({"mine": record})).splitlines()[1]
    assert empty == "mine,cats,linear,loss,1.0,,a|b,120,3,1.5"


def test_an_entry_is_called_as_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (".", "../" + tmp_path.name + "/", str(tmp_path)):
        assert entry_name(pathlib.Path(out)) == tmp_path.name


def test_files(tmp_path):
    out = tmp_path / "new" / "out"
    assert read_record(out) is None
    write_record(out, RECORD)
    assert read_record(out) == RECORD
    assert json.loads((out / "table.json").read_text()) == rows({"out": RECORD})
    assert sorted(p.name for p in out.iterdir()) == [
        "result.json",
        "table.csv",
        "table.json",
        "table.md",
    ]


def test_a_damaged_record(tmp_path):
    write_record(tmp_path, RECORD)
    text = (tmp_path / "result.json").read_text()
    (tmp_path / "result.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"result.json is damaged .*delete it, or choose another"):
        read_record(tmp_path)
