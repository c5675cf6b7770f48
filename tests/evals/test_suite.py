"""The suite: a file of entries becomes commands, folders and one table."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dinov2_jax.config import REPOSITORY, ConfigError
from dinov2_jax.evals import suite
from dinov2_jax.evals.__main__ import find_task, main
from dinov2_jax.evals.command import make_parser
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.suite import entry_argv, read_suite, run_suite
from dinov2_jax.evals.task import Task
from dinov2_jax.evals.tasks import TASKS
from tests.two_processes import free_port

RUNS = []


def add_flags(parser):
    parser.add_argument("--votes", type=int, nargs="+", default=[1])
    parser.add_argument("--broken", action="store_true")


def run(run):
    RUNS.append((run.data, run.flags.votes, run.model.spec.patch_size, run.cache))
    if run.flags.broken:
        raise ValueError("the labels are missing")
    return Result(metrics={"top1": 50.0}, headline=["top1"], protocol={}, counts={"test": 3})


def stand_in(name: str) -> Task:
    return Task(name=name, summary="", layout="anything", add_flags=add_flags, run=run)


@pytest.fixture
def write(tmp_path):
    RUNS.clear()

    def write(entries: str) -> list[str]:
        (tmp_path / "suite.py").write_text(f"def get_config():\n    return {entries}\n")
        return [
            *("--config", str(tmp_path / "suite.py"), "--model", "pixels:8"),
            *("--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")),
        ]

    return write


ENTRIES = """{
    "one": {"task": "knn", "data": "a/b", "votes": [3, 4]},
    "bad": {"task": "linear", "data": "c", "broken": True},
    "two": {"task": "linear", "data": "hf:c", "broken": False, "dataset": None},
}"""


def test_every_entry_is_a_command_and_a_failure_stops_none(write, tmp_path):
    failures = run_suite(write(ENTRIES), find_task=stand_in)
    assert failures == ["bad: the labels are missing"]
    cache = tmp_path / "out" / "features"
    assert RUNS == [
        (str(tmp_path / "data" / "a/b"), [3, 4], 8, cache),
        (str(tmp_path / "data" / "c"), [1], 8, cache),
        ("hf:c", [1], 8, cache),
    ]
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["entry"], row["task"]) for row in table] == [("one", "knn"), ("two", "linear")]
    assert (tmp_path / "out" / "one" / "result.json").exists()


def test_again_only_what_failed_is_run(write):
    argv = write(ENTRIES)
    run_suite(argv, find_task=stand_in)
    RUNS.clear()
    run_suite(argv, find_task=stand_in)
    assert [votes for _, votes, _, _ in RUNS] == [[1]]
    RUNS.clear()
    run_suite([*argv, "--only", "^one$", "--force"], find_task=stand_in)
    assert [votes for _, votes, _, _ in RUNS] == [[3, 4]]


def test_the_result_of_another_request_is_not_in_the_table(write, tmp_path):
    argv = write(ENTRIES)
    run_suite(argv, find_task=stand_in)
    argv = write(ENTRIES.replace("[3, 4]", "[5]"))
    first, second = run_suite(argv, find_task=stand_in)
    assert "holds the result of another request" in first and second.startswith("bad: ")
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["entry"] for row in table] == ["two"]


def test_a_model_is_loaded_once_for_all_that_share_it(write, monkeypatch):
    loaded = []
    load = suite.load_model
    monkeypatch.setattr(suite, "load_model", lambda flags: loaded.append(flags.seed) or load(flags))
    entries = '{c: {"task": "knn", "data": c, "seed": int(c == "z")} for c in "xyz"}'
    assert run_suite(write(entries), find_task=stand_in) == []
    assert loaded == [0, 1]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{}", r"must return a dictionary of entries, at least one"),
        ("[1]", r"must return a dictionary of entries"),
        ('{"a": {"task": "knn"}}', r'a must be \{"task": NAME, "data": PATH\}'),
        ('{"a/b": {"task": "knn", "data": "c"}}', r"the name 'a/b' must be one of a folder"),
        ('{"a": {"task": "knn", "data": "c", "vote": 1}}', r"a: unrecognized arguments: --vote 1"),
        ('{"a": {"task": "knn", "data": "c", "votes": "x"}}', r"a: argument --votes: invalid int"),
    ],
)
def test_a_wrong_file_is_known_before_anything_runs(write, entries, message):
    argv = write(
        entries.replace("{", '{"first": {"task": "knn", "data": "d"}, ', 1)
        if entries.startswith('{"')
        else entries
    )
    with pytest.raises(ConfigError, match=message):
        run_suite(argv, find_task=stand_in)
    assert not RUNS


def test_values_become_words():
    flags = argparse.Namespace(model="m", data="d", out=pathlib.Path("o"), cache=None)
    entry = {"task": "depth", "data": "hf:x", "some_sizes": [1, 2], "on": True, "off": False}
    entry |= {"head": "{out}/nyu/head", "test": {"v2": "{data}/v2", "real": "r.json"}}
    argv = entry_argv(entry, flags=flags, name="e")
    assert argv[:8] == ["--data", "hf:x", "--model", "m", "--out", "o/e", "--cache", "o/features"]
    here = os.getcwd()  # a relative path of a task starts at its own data
    assert argv[8:] == [
        *("--some-sizes", "1", "2", "--on", "--head", f"{here}/o/nyu/head"),
        *("--test", f"v2={here}/d/v2", "--test", "real=r.json"),
    ]


def test_the_table_of_some_entries_keeps_the_others(write, tmp_path):
    argv = write(ENTRIES)
    run_suite(argv, find_task=stand_in)
    before = (tmp_path / "out" / "table.json").read_text()
    run_suite([*argv, "--only", "^two$"], find_task=stand_in)
    assert (tmp_path / "out" / "table.json").read_text() == before


def test_processes_join_before_jax_is_used(write, monkeypatch):
    order = []
    load = suite.load_model
    monkeypatch.setattr(suite.distributed, "initialize", lambda mode, **_: order.append(mode))
    is_primary = suite.distributed.is_primary
    monkeypatch.setattr(
        suite.distributed, "is_primary", lambda: order.append("used") or is_primary()
    )
    monkeypatch.setattr(suite, "load_model", lambda flags: order.append("loaded") or load(flags))
    argv = write('{"a": {"task": "knn", "data": "b"}}')
    run_suite([*argv, "--distributed", "auto"], find_task=stand_in)
    assert order[0] == "auto" and "loaded" in order


def test_other_processes_than_the_first_say_and_write_nothing(write, tmp_path, capsys, monkeypatch):
    argv = write(ENTRIES)
    run_suite([*argv, "--only", "one"], find_task=stand_in)
    (tmp_path / "out" / "table.json").unlink()
    capsys.readouterr()
    monkeypatch.setattr(suite.distributed, "is_primary", lambda: False)
    assert run_suite([*argv, "--only", "one"], find_task=stand_in) == []
    assert capsys.readouterr().out == "" and not (tmp_path / "out" / "table.json").exists()


TWO_PROCESSES = """
import sys
import jax
from dinov2_jax import distributed
from dinov2_jax.evals import __main__ as program
from tests.evals import test_suite

distributed._FAILING_SECS = 5

def run(run):
    if run.data.endswith("both") or run.data.endswith("alone") and jax.process_index():
        raise ValueError("no such data")
    distributed.meet()
    return test_suite.run(run)

def find_task(name):
    return test_suite.Task(name, "", "anything", test_suite.add_flags, run)

program.find_task = find_task
sys.exit(program.main(["suite", *sys.argv[1:], "--distributed=on"]))
"""


def test_what_fails_on_one_process_alone_ends_all(write, tmp_path):
    """What fails on both is left out; the other would wait for one that fails alone."""
    argv = write('{x: {"task": "knn", "data": x} for x in ("both", "fine", "alone", "never")}')
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, *argv],
            env=environment | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        (first, end), (_, second) = (process.communicate(timeout=200) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2]
    assert "left out: both: no such data" in first and "| fine | fine | knn | top1" in first
    assert "[3/4] alone" in first and "never" not in first
    why = "alone failed, but not on all processes: no such data"
    assert f"error: process 1: {why}\n" in second
    assert f"error: process 0: process 1 failed: {why}\n" in end
    assert (tmp_path / "out" / "fine" / "result.json").exists()


def test_a_name_that_none_has(write):
    with pytest.raises(ConfigError, match=r"--only zebra must match a name of .*; none does"):
        run_suite([*write(ENTRIES), "--only", "zebra"], find_task=stand_in)


def test_a_pattern_that_is_none(write):
    with pytest.raises(ValueError, match=r"--only: '\(' must be a pattern: missing \)"):
        run_suite([*write(ENTRIES), "--only=("], find_task=stand_in)


def test_exit_code_and_errors_by_entry(write, capsys):
    argv = write('{"a": {"task": "knn", "data": "nowhere"}}')
    assert main(["suite", *argv]) == 2
    assert "error: a: " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "evals").glob("[a-z]*.py")))
def test_the_suites_that_are_shipped_parse(path):
    flags = argparse.Namespace(
        model="m", data="d", out=pathlib.Path("out"), cache=None, config=str(path)
    )
    entries = read_suite(str(path))
    for name, entry in entries.items():
        argv = entry_argv(entry, flags=flags, name=name)
        make_parser(find_task(entry["task"])).parse_args(argv)
    assert {entry["task"] for entry in entries.values()} <= set(TASKS)
