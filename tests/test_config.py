"""Configurations: references, overrides, one-line errors, rules, comparison."""

import json
import re
import subprocess
import sys

import pytest

from dinov2_jax import config as config_lib
from dinov2_jax.config import ConfigError, compare_configs, flatten_config, load_config

CONFIGS = config_lib.REPOSITORY / "configs"
QUICKSTART = str(CONFIGS / "quickstart.py")
RECIPES = ("quickstart", "small", "vits14", "vitb14", "vitl14", "vitg14", "vitl16_short")


def _load(*overrides: str, path: str = QUICKSTART):
    return load_config(path, [tuple(text.split("=", 1)) for text in overrides])


def _error(*overrides: str, path: str = QUICKSTART) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(*overrides, path=path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _delta(tmp_path, *lines: str) -> str:
    path = tmp_path / "mine.py"
    body = "\n".join(f"    {line}" for line in lines)
    path.write_text(
        "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        f"    config.data.path = 'photos:'\n{body}\n    return config\n"
    )
    return str(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_with_the_reference_values_it_states(recipe):
    config = _load("data.path=photos:", path=str(CONFIGS / f"{recipe}.py"))
    doc = (CONFIGS / f"{recipe}.py").read_text()
    assert f"--config=configs/{recipe}.py" in doc
    # protocols A.2, per recipe: batch, group, base lr, wd end, layer decay, momentum, drop path.
    expected = {
        "vitl14": (3072, 32, 2e-4, 0.2, 1.0, 0.994, 0.4, 625_000, 100_000, 37_500, 1_250),
        "vitg14": (3072, 12, 2e-4, 0.2, 1.0, 0.994, 0.4, 625_000, 100_000, 37_500, 1_250),
        "vitl16_short": (2048, 64, 4e-3, 0.4, 0.9, 0.992, 0.3, 125_000, 12_500, 37_500, 1_250),
    }
    if recipe in expected:
        optim = config.optim
        found = (
            config.global_batch_size,
            config.group_size,
            optim.base_learning_rate,
            optim.weight_decay_end,
            optim.layerwise_lr_decay,
            config.teacher.momentum_start,
            config.model.drop_path_rate,
            config.total_steps,
            optim.warmup_steps,
            config.centering.teacher_temp_warmup_steps,
            optim.freeze_last_layer_steps,
        )
        assert found == expected[recipe]
        assert (config.dino.bottleneck_dim, config.ibot.separate_head) == (
            (256, False) if recipe == "vitl16_short" else (384, True)
        )


def test_lengths_follow_total_steps_and_an_explicit_override_wins():
    vitl14 = str(CONFIGS / "vitl14.py")
    config = _load("data.path=x", "total_steps=6250", path=vitl14)
    assert config.optim.warmup_steps == 1000
    assert config.centering.teacher_temp_warmup_steps == 375
    config = _load("optim.warmup_steps=7", "data.path=x", "total_steps=6250", path=vitl14)
    assert (config.optim.warmup_steps, config.eval_every_steps) == (7, 125)


def test_values_are_read_as_the_base_has_them():
    config = _load(
        "optim.clip_norm=3",
        "optim.base_learning_rate=1e-4",
        "global_batch_size=6_4",
        "pictures=False",
        "crops.global_crop_scale=[0.5, 1]",
        'data.mixture=(("a b", 1), ("c", 0.5))',
        "data.path=",
        "eval.name=1",
    )
    assert config.optim.clip_norm == 3.0 and isinstance(config.optim.clip_norm, float)
    assert config.optim.base_learning_rate == 1e-4
    assert config.global_batch_size == 64
    assert config.pictures is False
    assert config.crops.global_crop_scale == (0.5, 1)
    assert config.data.mixture == (("a b", 1), ("c", 0.5))
    assert config.eval.name == "1"
    with pytest.raises(AttributeError):
        config.new_key = 1


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("total_step=5", "total_steps"),
        ("optim.base_lerning_rate=5", "optim.base_learning_rate"),
        ("mask_probability=0.5", "masks.mask_probability"),
        ("optimm.clip_norm=5", "optim.clip_norm"),
        ("seed.x=5", "seed"),
        ("lr=5", "optim.base_learning_rate"),
        ("optim.lr=5", "optim.base_learning_rate"),
        ("learning_rate=5", "optim.base_learning_rate"),
        ("batch_size=5", "global_batch_size"),
        ("train.batch_size_per_gpu=5", "group_size"),
        ("evall.batch_size=5", "eval.batch_size"),
        ("epochs=5", "total_steps"),
        ("patch_size=5", "model.patch_size"),
        ("clip_norm=5", "optim.clip_norm"),
        ("weight_decay=5", "optim.weight_decay_end"),
    ],
)
def test_an_unknown_override_suggests_the_nearest_key(override, suggestion):
    message = _error(override)
    assert message.startswith(f"--config.{override.split('=')[0]}: no such key")
    assert message.endswith(f"did you mean {suggestion}?")


def test_synonyms_are_no_keys_and_mean_some():
    keys = set(flatten_config(_load()))
    assert set(config_lib.SYNONYMS.values()) <= keys and not set(config_lib.SYNONYMS) & keys


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("total_steps=5.5", "type int"),
        ("total_steps=many", "type int"),
        ("total_steps=True", "type int"),
        ("optim.clip_norm=True", "type float"),
        ("optim.clip_norm=nan", "type float"),
        ("optim.clip_norm=1e999", "finite"),
        ("pictures=1", "true or false"),
        ("augment.mean=0.5", "type tuple"),
        ('augment.mean=("a", 1, 2)', "numbers only"),
        ("optim=3", "group of keys"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override, complaint):
    message = _error(override)
    assert override.split("=")[0] in message and complaint in message


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("config.total_step = 5", r"mine\.py:7: total_step: no such key; .*mean total_steps\?"),
        ("config.optim.clip_nrm = 5", r":7: clip_nrm: no such key; .*mean optim\.clip_norm\?"),
        ("config.optimm.clip_norm = 5", r":7: optimm: no such key; .*mean optim\?"),
        ("config['optim']['foo'] = 5", r":7: foo: no such key"),
        ("config.optim.lr = 5", r":7: lr: no such key; .*mean optim\.base_learning_rate\?"),
        ("config.batch_size = 5", r":7: batch_size: no such key; .*mean global_batch_size\?"),
        ("config.total_steps = 'x'", r":7: .*type"),
        ("config.optim.clip_norm = 'x'", r":7: clip_norm has the wrong type"),
        ("config.checkpoint_every_steps = config.get_ref('total_steps') * 0.1", "type int"),
        ("config.unlock(); config.optim.foo = 1", r"mine\.py: optim\.foo: no such key"),
        ("config.unlock(); del config.optim.clip_norm", r"optim\.clip_norm is missing"),
        ("config = {}", r"must return a ConfigDict"),
        ("config.total_steps = 1 / 0", r":7: ZeroDivisionError: division by zero"),
        ("config.total_steps = = 1", r":7: SyntaxError"),
        ("import not_a_module", r":7: ModuleNotFoundError"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(tmp_path, line, complaint):
    assert re.search(complaint, _error(path=_delta(tmp_path, line)))


def test_a_missing_file_lists_the_shipped_ones():
    assert "configs/ has base.py" in _error(path="configs/quikstart.py")
    assert "configs/evals/ has paper.py" in _error(path="configs/evals/papr.py")


def test_comparison_sees_what_changes_results_and_nothing_else():
    old = json.loads(config_lib.to_json(_load("total_steps=500")))
    assert compare_configs(old, _load("total_steps=500")) == []
    new = _load(
        "total_steps=1000", "optim.clip_norm=1.0", "log_every_steps=3", "loader.num_threads=1"
    )
    differences = compare_configs(old, new)
    assert "optim.clip_norm: 3.0 -> 1.0" in differences
    assert "total_steps: 500 -> 1000" in differences
    assert "optim.warmup_steps: 50 -> 100" in differences
    assert not [line for line in differences if "log_every" in line or "loader" in line]
    del old["optim"]["clip_norm"]
    assert compare_configs(old, _load("total_steps=500")) == ["optim.clip_norm: '(absent)' -> 3.0"]


def test_kinds_of_keys_follow_the_sections_of_base():
    section, sections = None, {}
    for line in (CONFIGS / "base.py").read_text().splitlines():
        header = re.match(r"    # ---- ([a-z -]+?) -+$", line)
        key = re.match(r"    config\.([\w.]+) = ", line)
        section = header.group(1) if header else section
        if key:
            sections[key.group(1)] = section
    keys = flatten_config(_load(path=str(CONFIGS / "quickstart.py")))
    assert set(sections) >= set(keys)
    for key in keys:
        expected = sections[key] == "result-changing" and key != "data.max_bad_fraction"
        assert config_lib.is_result_changing(key) == expected, key


def test_base_is_found_from_any_directory_and_hides_no_other_configs_package(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    (tmp_path / "configs" / "base.py").write_text("raise RuntimeError('not this one')\n")
    program = (
        "import configs, sys\n"
        "from dinov2_jax.config import load_config\n"
        f"load_config({QUICKSTART!r})\n"
        "assert sys.modules['configs'] is configs\n"
        "assert not {'jax', 'flax'} & set(sys.modules)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{config_lib.REPOSITORY}"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
