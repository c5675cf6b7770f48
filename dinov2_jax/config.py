"""The configuration at the door: load a configs/*.py file, override, check, write, compare.

Comes in: a path and `--config.a.b=value` texts. Goes out: a locked ConfigDict of plain values.
Whatever is wrong with them is a `ConfigError` of one line that names the value, the rule and the
cure. What values may be together is in `config_rules.py`.
"""

import ast
import contextlib
import difflib
import importlib.util
import json
import math
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from dinov2_jax import config_rules
from dinov2_jax.config_rules import ConfigError

__all__ = ["ConfigError", "compare_configs", "flatten_config", "load_config", "to_json"]

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Keys (or whole groups) that a resumed run may change; every other key changes results. The two
# tuples repeat the sections of configs/base.py, and a test holds them together.
SPEED_ONLY = tuple(
    "remat attention layer_norm product_form drop_path_form heads head_block_size scan_unroll "
    "compiler_preset mesh loader".split()
)
BOOKKEEPING = (
    "log_every_steps",
    "checkpoint_every_steps",
    "eval_every_steps",
    "teacher_every_steps",
    "profile_steps",
    "checkpoints",
    "eval",
    "guards",
    "pictures",
    "tensorboard",
    "wandb_project",
    # In the data section, but it only decides whether a run goes on: raising it is the cure that
    # the error about bad images names, so a resumed run must be able to.
    "data.max_bad_fraction",
)

# What other code bases call a key, by its last part; small, for what one types from memory.
SYNONYMS = {
    name: key
    for key, names in {
        "total_steps": "steps num_steps max_steps train_steps iterations epochs num_epochs",
        "global_batch_size": "batch batch_size",
        "group_size": "batch_size_per_gpu batch_size_per_device per_device_batch_size",
        "data.path": "dataset dataset_path data_dir train_dir",
        "crops.global_crop_size_px": "image_size img_size crop_size resolution",
        "model.variant": "arch backbone model_name",
        "model.depth": "num_layers num_blocks",
        "dino.num_prototypes": "out_dim",
        "optim.base_learning_rate": "lr base_lr learning_rate",
        "optim.weight_decay_end": "wd weight_decay",
        "optim.clip_norm": "grad_clip clip_grad",
        "teacher.momentum_start": "momentum momentum_teacher ema ema_decay",
        "dtype": "precision amp",
        "grad_accumulation_steps": "accum_steps accum_iter",
        "loader.num_workers": "workers",
        "log_every_steps": "log_every log_interval print_freq",
        "checkpoint_every_steps": "save_every save_interval",
        "wandb_project": "wandb",
    }.items()
    for name in names.split()
}


def load_config(
    path: str, overrides: Sequence[tuple[str, str]] = (), *, needs_data: bool = True
) -> ConfigDict:
    """Runs a configuration file, applies the overrides and checks the result.

    Lengths that follow `total_steps` by reference go on following it; an explicit override wins
    over the reference. Integers are accepted where the base has a float, lists where it has a
    tuple, nothing else is converted.

    Args:
      path: a Python file with `get_config()`, usually a delta on `configs/base.py`.
      overrides: pairs of a dotted key without "config." and the text of its value.
      needs_data: whether the configuration must say where the images are.

    Returns:
      The resolved configuration, locked: plain values, no references left.

    Raises:
      ConfigError: one line, for anything that is wrong with the file or an override.
    """
    with _configs_package():
        base = run_file(REPOSITORY / "configs" / "base.py")
        config = run_file(pathlib.Path(path))
    defaults = flatten_config(base)
    _check_keys(config, defaults, path)
    for key, text in overrides:
        if key not in defaults:
            raise ConfigError(_unknown_key(f"--config.{key}", key, defaults))
        value = _parse_value(f"--config.{key}", text, defaults[key])
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    config = ConfigDict(config).copy_and_resolve_references()
    for key, value in flatten_config(config).items():
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = _convert(key, value, defaults[key])
    config_rules.check_config(config, needs_data=needs_data)
    return config.lock()


def flatten_config(config: Mapping) -> dict[str, object]:
    """{"optim.clip_norm": 3.0, ...} of a nested configuration, references resolved."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, Mapping | ConfigDict):
            flat.update({f"{key}.{name}": item for name, item in flatten_config(value).items()})
        else:
            flat[key] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The resolved values as indented JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def compare_configs(old: Mapping, new: Mapping) -> list[str]:
    """Lists the result-changing differences, such as "optim.clip_norm: 3.0 -> 1.0".

    Args:
      old: what the run was started with: `json.loads` of its config.json.
      new: the configuration of now, nested likewise.
    """
    absent = "(absent)"
    old, new = (json.loads(json.dumps(flatten_config(config))) for config in (old, new))
    return [
        f"{key}: {old.get(key, absent)!r} -> {new.get(key, absent)!r}"
        for key in sorted({*old, *new})
        if is_result_changing(key) and old.get(key, absent) != new.get(key, absent)
    ]


def is_result_changing(key: str) -> bool:
    """Whether a dotted key takes part in what the run computes, beyond rounding."""
    return not any(key == name or key.startswith(f"{name}.") for name in SPEED_ONLY + BOOKKEEPING)


def nearest(word: str, words) -> str | None:
    """The dotted key most like `word`, by its whole name or by its last part."""

    def likeness(candidate: str) -> float:
        ratio = difflib.SequenceMatcher(None, word, candidate).ratio()
        last = difflib.SequenceMatcher(None, word.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(ratio, last) + 0.01 * ratio

    best = max(words, key=likeness, default=None)
    return best if best is not None and likeness(best) > 0.6 else None


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The known key that an unknown one most likely means: a usual synonym, else the most alike.

    A last part that some known key has ("batch_size") is a synonym only where it stands alone.
    """
    last = key.split(".")[-1]
    is_misplaced = "." in key and any(name.split(".")[-1] == last for name in known)
    return nearest(key, known) if is_misplaced else SYNONYMS.get(last) or nearest(key, known)


def _unknown_key(shown: str, key: str, defaults: Mapping[str, object]) -> str:
    members = sorted(name for name in defaults if name.startswith(f"{key}."))
    if members:
        return f"{shown} is a group of keys, not a value; set one of {', '.join(members)}"
    suggestion = nearest_key(key, list(defaults))
    cure = f"did you mean {suggestion}?" if suggestion else "configs/base.py lists every key"
    return f"{shown}: no such key; {cure}"


def _check_keys(config, defaults: Mapping[str, object], path: str) -> None:
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() must return a ConfigDict; start from base.py's")
    flat = flatten_config(config)
    for key in flat:
        if key not in defaults:
            raise ConfigError(f"{path}: " + _unknown_key(key, key, defaults))
    for key in defaults:
        if key not in flat:
            raise ConfigError(f"{path}: {key} is missing; start from base.get_config()")


def _parse_value(shown: str, text: str, default) -> object:
    """The value that `text` means, where the base configuration has `default`."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{shown}={text} must be true or false")
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return _convert(shown, value, default)


def _convert(shown: str, value, default) -> object:
    """`value` as the type of `default`, or a ConfigError."""
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        example = f", such as {default!r}" if default not in ("", ()) else ""
        raise ConfigError(f"{shown}={value!r} must be of type {kind.__name__}{example}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{shown}={value!r} must be finite")
    if kind is tuple and default:
        for item in value:
            if type(item) not in (int, float):
                raise ConfigError(f"{shown}={value!r} must hold numbers only, such as {default!r}")
    return value


@contextlib.contextmanager
def _configs_package():
    """Makes `from configs import base` mean this repository's, whatever the working directory."""
    root = REPOSITORY / "configs" / "__init__.py"
    if not root.is_file():
        raise ConfigError(f"{root} is missing; use a clone with pip install -e .")
    spec = importlib.util.spec_from_file_location(
        "configs", root, submodule_search_locations=[str(root.parent)]
    )
    ours = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "configs"}
    for name in ours:
        del sys.modules[name]
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
            del sys.modules[name]
        sys.modules.update(ours)


def run_file(path: pathlib.Path):
    """`get_config()` of a file; any failure in it as one line with its place."""
    if not path.is_file():
        folder = REPOSITORY / "configs"
        if (near := path.resolve().parent).is_relative_to(folder) and near.is_dir():
            folder = near
        shipped = sorted(p.name for p in folder.glob("[a-z]*.py"))
        where = folder.relative_to(REPOSITORY)
        raise ConfigError(f"--config={path} is not a file; {where}/ has {', '.join(shipped)}")
    try:
        return runpy.run_path(str(path))["get_config"]()
    except ConfigError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
        place = f"{path}:{line}" if line else str(path)
        raise ConfigError(f"{place}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """One line for what a locked, typed ConfigDict complains about; else the error itself."""
    text = str(error)
    # A read of an absent key says its name alone, quoted once or twice over.
    unknown = re.search(
        r"Key \\?\"(\w+)\\?\" does not exist|^['\"\\]+(\w+)['\"\\]+(?:$|n?Did|\nDid)", text
    )
    if isinstance(error, KeyError | AttributeError) and unknown:
        key = unknown.group(1) or unknown.group(2)
        if key == "get_config":
            return "a configuration file must define get_config()"
        keys = flatten_config(runpy.run_path(str(REPOSITORY / "configs/base.py"))["get_config"]())
        groups = {".".join(name.split(".")[:-1]) for name in keys} - {""}
        suggestion = nearest_key(key, [*keys, *groups])
        cure = f"did you mean {suggestion}?" if suggestion else "configs/base.py lists every key"
        return f"{key}: no such key; {cure}"
    wrong = re.search(r"Could not override field '(\w+)' \(reference\)\. (.*)", text)
    if isinstance(error, TypeError) and wrong:
        return f"{wrong.group(1)} has the wrong type: {wrong.group(2).strip()}"
    return f"{type(error).__name__}: {' '.join(text.split())}"
