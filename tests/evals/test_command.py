"""The command around a task: help, errors, done results shown, others refused."""

import dataclasses
import json
import subprocess
import sys

import fsspec
import pytest

from dinov2_jax import distributed, model
from dinov2_jax.config import REPOSITORY
from dinov2_jax.evals import __main__ as program
from dinov2_jax.evals.__main__ import find_task, main
from dinov2_jax.evals.command import make_parser
from dinov2_jax.evals.tasks import TASKS, knn
from tests.evals.conftest import read, write_images


@pytest.fixture
def arguments(arguments):
    return ["knn", *arguments, "--neighbors", "1", "3"]


def test_a_result_that_is_there_is_shown_and_not_made_again(
    arguments, tmp_path, capsys, monkeypatch
):
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "24 images in 3 classes from folder" in said
    record = read(tmp_path)
    assert record["request"]["neighbors"] == [1, 3] and record["seed"] == 0
    assert record["model"]["weights_sha256"] and record["peak_rss_mib"] > 0
    assert record["cpu_seconds"] >= 0
    assert record["dataset"].startswith("colors")

    monkeypatch.setattr(knn, "TASK", dataclasses.replace(knn.TASK, run=lambda _: 1 / 0))
    assert main([*arguments, "--batch-size=7", "--threads=1"]) == 0
    shown = capsys.readouterr().out
    assert "has this result already; --force makes it again" in shown
    assert shown.splitlines()[-1] == said.splitlines()[-1]
    with pytest.raises(ZeroDivisionError):
        main([*arguments, "--force"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--neighbors=5"], r"neighbors: [1, 3] -> [5]"),
        (["--seed=1"], "seed: 0 -> 1"),
        (["--blocks=2"], "blocks: None -> 2"),
        (["--model=pixels"], "weights_sha256: "),
    ],
)
def test_the_result_of_another_request_is_refused(arguments, tmp_path, capsys, change, message):
    if not (tmp_path / "out").exists():
        assert main(arguments) == 0
    before = (tmp_path / "out" / "result.json").read_bytes()
    capsys.readouterr()
    assert main([*arguments, *change]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds the result of another request" in error
    assert message in error and "--force to replace it" in error
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_pixels_of_another_patch_are_another_request(arguments, capsys):
    arguments = [*arguments, "--resize=16", "--crop=16"]
    assert main([*arguments, "--model=pixels:8"]) == 0
    assert main([*arguments, "--model=pixels:16"]) == 2
    assert "custom/8" in capsys.readouterr().err


def test_other_processes_than_the_first_say_and_write_nothing(
    arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    assert main(arguments) == 0
    assert capsys.readouterr().out == ""
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["features"]


def test_a_damaged_record_is_named(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{")
    assert main(arguments) == 2
    assert "result.json is damaged" in capsys.readouterr().err


def test_layouts_that_are_wrong(arguments, tmp_path, capsys):
    write_images(tmp_path / "one" / "train", count=2, seed=0, classes=("red",))
    write_images(tmp_path / "one" / "val", count=2, seed=0, classes=("red", "green"))
    assert main([*arguments, f"--data={tmp_path}/one"]) == 2
    error = capsys.readouterr().err
    assert "two or more classes, found 1; expected: a folder with train/" in error
    write_images(tmp_path / "new" / "train", count=2, seed=0, classes=("red", "green"))
    assert main([*arguments, f"--data={tmp_path}/new"]) == 2
    assert "holds no split val or validation or test; expected:" in capsys.readouterr().err
    write_images(tmp_path / "new" / "val", count=2, seed=0, classes=("red", "blue"))
    assert main([*arguments, f"--data={tmp_path}/new"]) == 2
    assert "classes ['blue'] of the tested split are not among the 2" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["knnn"], "'knnn' must be one of .*did you mean knn?"),
        (["xyz"], "--help says what each does"),
        (["knn"], "the following arguments are required: --model, --data, --out; --help"),
        (["knn", "--batch-size=x"], "'x' must be a whole number, at least 1"),
        (["knn", "--model=a", "--data=b", "--out=c", "--distributed=on"], "nothing says where the"),
        (["knn", "--crop=0"], "'0' must be a whole number, at least 1"),
        (["video", "--resize=x"], "'x' must be a whole number, at least 1"),
        (["knn", "--seed=-1"], "'-1' must be a whole number, at least 0"),
        (["knn", "--neighbors=0"], "'0' must be a whole number, at least 1"),
        (["knn", "--temperature=0"], "'0' must be above 0"),
        (["propagation", "--temperature=nan"], "'nan' must be above 0"),
        (["propagation", "--radius=-1"], "'-1' must be a whole number, at least 0"),
        (["knn", "--out=gs://b/o"], "'gs://b/o' must be a folder of a disk, not a URL"),
        (["suite", "--out=gs://b/o"], "'gs://b/o' must be a folder of a disk, not a URL"),
    ],
)
def test_wrong_words_are_one_line(capsys, argv, message):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for part in message.split(".*"):
        assert part in error


def test_data_at_a_url(arguments, colors, tmp_path, capsys):
    """k-NN of images in a store is that of a disk; other tasks say what reads URLs."""
    url = f"memory://{tmp_path.name}"
    for path in sorted(colors.rglob("*.png")):
        store_path = f"{url}/{path.relative_to(colors)}"
        fsspec.filesystem("memory").pipe(store_path, path.read_bytes())
    assert main(arguments) == main([*arguments, f"--data={url}", f"--out={tmp_path}/url"]) == 0
    records = [json.loads((tmp_path / x / "result.json").read_text()) for x in ("out", "url")]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["counts"] == records[1]["counts"]
    capsys.readouterr()
    for name in ("depth", "fairness", "propagation", "retrieval", "segmentation", "video"):
        assert main([name, *arguments[1:5], f"--data={url}", "--out=x"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"must be on a disk for {name}: copy it there; knn, linear and logreg" in error


def test_help(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in TASKS)
    for name in TASKS:
        task = find_task(name)
        assert task.name == name
        parser = make_parser(task)
        assert task.layout in parser.format_help() and "--model" in parser.format_help()


def test_weights_are_hashed_once(arguments, monkeypatch):
    """Of two sets of features, each with an index of its own: of a large model it takes seconds."""
    hashed, sha256 = [], model._sha256
    monkeypatch.setattr(model, "_sha256", lambda params: hashed.append(1) or sha256(params))
    assert main(arguments) == 0
    assert hashed == [1]


@pytest.mark.parametrize("data", [".", "./", "../{name}"])
def test_a_data_set_is_called_as_its_folder(arguments, colors, tmp_path, monkeypatch, data):
    monkeypatch.chdir(colors)
    assert main([*arguments, f"--data={data.format(name=colors.name)}"]) == 0
    assert read(tmp_path)["dataset"] == colors.name


def test_a_full_disk_and_ctrl_c(arguments, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run_task", full)
    assert main(arguments) == 1
    assert "free space, and the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(program, "run_task", interrupted)
    assert main(arguments) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


def test_the_overview_imports_no_task():
    text = (
        "import sys\nfrom dinov2_jax.evals.__main__ import main\nmain([])\n"
        "assert not [m for m in sys.modules if m.startswith('dinov2_jax.evals.tasks.')]\n"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    subprocess.run([sys.executable, "-c", text], env=environment, check=True, capture_output=True)
