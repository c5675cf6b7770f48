"""Pairs of runs: every change is a configuration, and differences are of the same seed."""

import json

import pytest

from benchmarks import ablations
from benchmarks.changes import CHANGES, PLAIN
from dinov2_jax.config import REPOSITORY, load_config


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_one_of_the_recipe(name):
    recipe = str(REPOSITORY / "configs" / "small.py")
    settings = [(key, str(value)) for key, value in CHANGES[name].items()]
    plain = load_config(recipe, [], needs_data=False).to_json()
    assert (load_config(recipe, settings, needs_data=False).to_json() == plain) == (name == PLAIN)


def write_run(runs, name, *, knn, rank, retrieval=None, is_finished=True):
    workdir = runs / name
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"total_steps": 20, "global_batch_size": 64}))
    lines = [{"step": 10, "knn/val/cls": 0.1}, {"step": 20, "feature_rank": rank}]
    lines += [{"step": 20, "knn/val/cls": knn}] * is_finished
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if retrieval is not None:
        (workdir / "evals" / "retrieval").mkdir(parents=True)
        result = json.dumps({"metrics": {"map": retrieval}})
        (workdir / "evals" / "retrieval" / "result.json").write_text(result)


def test_the_table_compares_runs_of_one_seed(tmp_path):
    write_run(tmp_path, "plain-seed0", knn=0.40, rank=10.0, retrieval=60.0)
    write_run(tmp_path, "plain-seed1", knn=0.44, rank=12.0)
    write_run(tmp_path, "no-koleo-seed0", knn=0.30, rank=5.0, retrieval=50.0)
    write_run(tmp_path, "no-koleo-seed1", knn=0.32, rank=4.0)
    write_run(tmp_path, "no-ibot-seed0", knn=0.9, rank=9.0, is_finished=False)
    header, _, plain, changed = ablations.table(tmp_path).splitlines()
    column = {name.strip(): i for i, name in enumerate(header.split("|"))}
    plain, changed = ([cell.strip() for cell in row.split("|")] for row in (plain, changed))
    assert (plain[1], changed[1]) == ("plain", "no-koleo")
    assert plain[column["kNN CLS, %"]] == "42"
    assert changed[column["kNN CLS, %"]] == "31 (-11: -12 to -10)"
    assert changed[column["rank"]] == "4.5 (-6.5: -8 to -5)"
    assert changed[column["retrieval mAP, %"]] == "50 (-10: -10 to -10)"
    assert changed[column["left-out kNN CLS, %"]] == ""


def test_a_name_that_is_no_change(tmp_path):
    options = type("Options", (), {"only": "^nonsense$"})
    with pytest.raises(SystemExit, match=r"no change is called '\^nonsense\$'; there are"):
        ablations.run_all(options)
