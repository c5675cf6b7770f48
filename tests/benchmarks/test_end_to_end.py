"""Whole runs beside lightly-train's: the commands, the images, and what the subtraction leaves."""

import argparse
import json
import pathlib
import sys

import numpy as np
import pytest

from benchmarks import end_to_end
from dinov2_jax.config import load_config
from dinov2_jax.flags import parse_flags

OPTIONS = argparse.Namespace(
    steps=[3, 13],
    batch_size=4,
    prototypes=4096,
    drop_path_rate=0.2,
    workers=2,
    lightly_python="venv/bin/python",
)


def make_images(folder: pathlib.Path) -> pathlib.Path:
    """Empty files: nothing here decodes them."""
    for name in ("b/one.jpg", "a.jpeg", "notes.txt"):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder / "images"


def test_our_command_is_one_of_the_trainer():
    command = end_to_end.run_ours(OPTIONS, "links", "workdir", 13)
    assert command[:3] == [sys.executable, "-m", "dinov2_jax.train"]
    flags = parse_flags(command[3:])
    config = load_config(flags.config, flags.overrides)
    assert flags.workdir == "workdir" and config.data.path == "links"
    assert (config.total_steps, config.global_batch_size, config.group_size) == (13, 4, 4)
    assert (config.model.drop_path_rate, config.loader.num_workers) == (0.2, 2)
    for head in (config.dino, config.ibot):
        assert (head.num_prototypes, head.bottleneck_dim) == (4096, 256)
    # What the page says that both train.
    crops = config.crops
    assert (crops.global_crop_size_px, crops.local_crop_size_px) == (224, 98)
    assert (crops.num_local_crops, config.model.variant) == (8, "vit_small")
    assert config.ibot.separate_head and config.centering.kind == "sinkhorn_knopp"


@pytest.mark.parametrize("steps", [3, 1000])
def test_a_run_of_any_length_saves_once(steps):
    """What it saves on the way would grow with the steps, and stay in the difference."""
    flags = parse_flags(end_to_end.run_ours(OPTIONS, "links", "workdir", steps)[3:])
    config = load_config(flags.config, flags.overrides)
    names = ("checkpoint_every_steps", "eval_every_steps", "teacher_every_steps")
    assert [config[name] for name in names] == [0, 0, 0]


def test_the_other_command_gives_its_script_the_same_sizes():
    python, script, text = end_to_end.run_lightly(OPTIONS, "links", "workdir", 13)
    assert python == OPTIONS.lightly_python and pathlib.Path(script).is_file()
    arguments = json.loads(text)
    assert (arguments["folder"], arguments["workdir"]) == ("links", "workdir")
    assert (arguments["steps"], arguments["batch_size"], arguments["num_workers"]) == (13, 4, 2)
    assert arguments["model_args"] == {"drop_path_rate": 0.2}
    assert arguments["method_args"]["output_dim"] == 4096


def test_links_are_as_many_as_a_run_takes_and_all_images(tmp_path):
    images = make_images(tmp_path)
    for count, expected in ((5, 5), (1, 2)):
        links = tmp_path / f"links{count}"
        links.mkdir()
        end_to_end.link_images(str(images), links, count)
        found = sorted(links.iterdir())
        assert len(found) == expected and all(link.suffix == ".jpg" for link in found)
        assert {link.resolve() for link in found} == {images / "a.jpeg", images / "b" / "one.jpg"}
    with pytest.raises(SystemExit, match=r"error: no \.jpg or \.jpeg file in .*/empty"):
        end_to_end.link_images(str(tmp_path / "empty"), tmp_path, 1)


def test_what_does_not_grow_with_the_steps_cancels_out(monkeypatch, tmp_path):
    def run(command):
        """50 s of wall and 20 of CPU time to start, 2 and 3 a step."""
        links, workdir, steps = command
        assert len(list(pathlib.Path(links).iterdir())) == 13 * 4  # also in the shorter run
        assert not pathlib.Path(workdir).exists()
        return np.array([50 + 2 * steps, 20 + 3 * steps])

    monkeypatch.setattr(end_to_end, "run", run)
    make_command = lambda options, *rest: rest  # noqa: E731
    seconds = end_to_end.measure(make_command, OPTIONS, str(make_images(tmp_path)))
    np.testing.assert_allclose(seconds, [2 / 4, 3 / 4])


def test_the_report_is_of_medians_and_ratios(monkeypatch, tmp_path, capsys):
    def measure(make_command, options, folder):
        assert folder == str(tmp_path) and options.steps == [2, 4]
        return np.array([0.5, 0.25] if make_command is end_to_end.run_ours else [1.0, 1.0])

    monkeypatch.setattr(end_to_end, "measure", measure)
    monkeypatch.setattr(end_to_end, "limit_threads", lambda _: None)  # of this process, for good
    flags = ["--lightly-python", "python", "--steps", "2", "4", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["end_to_end", str(tmp_path), *flags])
    end_to_end.main()
    header, ours, theirs = capsys.readouterr().out.splitlines()
    assert header == "1 threads, 1 rounds, float32"
    assert (
        ours.split()
        == (
            "ours 2.00 images/s, 0.250 CPU s/image; ours is 1.00 times as fast, 1.00 by CPU time"
        ).split()
    )
    assert theirs.endswith("ours is 2.00 times as fast, 4.00 by CPU time")


def test_a_command_that_fails_shows_why():
    seconds = end_to_end.run([sys.executable, "-c", "pass"])
    assert seconds.shape == (2,) and (seconds >= 0).all() and seconds[0] > 0
    with pytest.raises(SystemExit, match=r"failed:\n.*no such thing"):
        end_to_end.run([sys.executable, "-c", "raise SystemExit('no such thing')"])
