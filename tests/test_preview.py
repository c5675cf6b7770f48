"""What the command says of a run before it starts: recipes pass, proposals apply, warnings lead."""

import re

import jax
import pytest

from dinov2_jax import preview, startup
from dinov2_jax.advice.proposals import suggest
from dinov2_jax.config import REPOSITORY, load_config
from dinov2_jax.train import main
from tests.small_run import run

FEW_STEPS = "warning: teacher.momentum_start=0.98 is too high for total_steps=12: "
HINT = "the same command with --suggest prints values that fit, with reasons"


@pytest.mark.parametrize(
    ("recipe", "num_images"),
    [
        ("quickstart", 19),
        ("small", 9_000),
        ("vits14", 14_000_000),
        ("vitb14", 14_000_000),
        ("vitl14", 14_000_000),
        ("vitg14", 142_000_000),
        ("vitl16_short", 1_281_167),
    ],
)
def test_no_recipe_is_warned_of_or_told_to_change(recipe, num_images):
    path = str(REPOSITORY / "configs" / f"{recipe}.py")
    config = load_config(path, [("data.path", "photos:")])
    trainer = startup.build_trainer(config, startup.build_mesh(config))
    assert preview.warnings(config, trainer, num_images=num_images) == []
    settings = preview.run_settings(config, trainer, num_images=num_images)
    assert not [item for item in suggest(settings) if item.is_change]


def test_a_hint_is_given_where_there_is_something_to_suggest():
    path = str(REPOSITORY / "configs" / "small.py")
    config = load_config(path, [("data.path", "photos:")])
    trainer = startup.build_trainer(config, startup.build_mesh(config))
    (line,) = preview.warnings(config, trainer, num_images=19)
    assert line.startswith("warning: global_batch_size=64 of 19 images takes each 3.4 times")


def test_settings_are_those_of_the_configuration_and_the_devices():
    path = str(REPOSITORY / "configs" / "vits14.py")
    changes = {
        "data.path": "photos:",
        "total_steps": "1000",
        "group_size": "8",
        "global_batch_size": "256",
        "grad_accumulation_steps": "2",
        "ibot.separate_head": "false",
        "masks.mask_ratio_max": "0.4",
        "dino.num_prototypes": "100",
        "ibot.num_prototypes": "200",
        "teacher.momentum_end": "0.999",
    }
    config = load_config(path, list(changes.items()))
    trainer = startup.build_trainer(config, startup.build_mesh(config))
    settings = preview.run_settings(config, trainer, num_images=77)
    assert settings.num_images == 77
    assert settings.num_batch_pieces == 2 * len(jax.devices())
    assert settings.embed_dim == 384  # the variant's
    assert (settings.warmup_steps, settings.total_steps) == (160, 1000)
    assert settings.prototypes == {"dino.num_prototypes": 100}
    assert (settings.dino_prototypes, settings.ibot_prototypes) == (100, 200)
    assert (settings.momentum_start, settings.momentum_end) == (0.994, 0.999)
    assert (settings.base_learning_rate, settings.learning_rate_factor) == (2e-4, 0.5)
    assert settings.rows["dino.num_prototypes", "masked patches"] == pytest.approx(
        2 * 256 * 0.5 * 0.25 * 16**2
    )


def test_what_suggest_prints_applies_and_leaves_nothing_to_change(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run(workdir, "--suggest") == 0
    first = capsys.readouterr().out.splitlines()
    assert first[0].startswith("19 images")
    assert any(line.startswith(FEW_STEPS) for line in first) and HINT not in first
    assert any(re.match(r"  key +now +suggested +why$", line) for line in first)
    flags = first[-1].split()
    assert all(flag.startswith("--config.") for flag in flags)
    changed = {flag.removeprefix("--config.").split("=")[0] for flag in flags}
    assert {"dino.num_prototypes", "teacher.momentum_start"} <= changed

    assert run(workdir, "--suggest", *flags) == 0
    second = capsys.readouterr().out.splitlines()
    assert second[-1] == "nothing to change"
    assert not [line for line in second if "momentum_start" in line and "warning" in line]
    assert not workdir.exists()


def test_a_dry_run_ends_with_the_warnings_and_a_hint(tmp_path, capsys):
    assert run(tmp_path / "run", "--dry_run") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == HINT and sum(line.startswith(FEW_STEPS) for line in out) == 1
    assert any("memory a device" in line for line in out)


def test_one_process_of_several_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert run(tmp_path / "run", "--suggest", "--dry_run") == 0
    assert capsys.readouterr().out == ""


def test_wrong_values_stay_errors(capsys):
    path = str(REPOSITORY / "configs" / "quickstart.py")
    assert main([f"--config={path}", "--suggest", "--config.optim.warmup_steps=401"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "at most total_steps=400" in captured.err
    assert captured.out == ""
