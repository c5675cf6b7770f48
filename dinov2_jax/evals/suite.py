"""Many tasks from one file: `python -m dinov2_jax.evals suite --config FILE --model M --data D`.

The file has `get_config()`, a dictionary: name of each entry -> `{"task": .., "data": .., flags}`.
Every entry is the command of its task: it has a folder of its own in OUT, goes on where it was,
and shares one model and one cache of features with the others.
"""

import argparse
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dinov2_jax import distributed
from dinov2_jax.arguments import Parser
from dinov2_jax.config import ConfigError, run_file
from dinov2_jax.evals.command import load_model, make_parser, out_folder, run_task
from dinov2_jax.evals.results import read_record, write_tables
from dinov2_jax.evals.task import Task
from dinov2_jax.model import Model
from dinov2_jax.workdir import is_disk_full

# Flags of one entry that make another model of the same file.
_MODEL_FLAGS = ("model", "blocks", "seed", "tree", "compute_dtype", "interpolation", "num_heads")
_OWN = ("task", "data")


def parse_suite(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The suite's own flags, and those that every entry gets."""
    parser = Parser(
        prog="python -m dinov2_jax.evals suite",
        description="Runs every entry of a file; the same command again goes on.",
        epilog="All other flags, such as --batch-size, --blocks or --distributed, are those of the "
        "tasks and go to every entry.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, help="such as configs/evals/paper.py")
    add("--model", required=True, help="as for every task")
    add("--data", required=True, help="the folder that the entries' data lie in")
    add("--out", required=True, type=out_folder, help="folder of all results and of the table")
    add("--cache", type=out_folder, help="folder of features; default OUT/features")
    add("--only", type=_pattern, default="", metavar="REGEX", help="entries whose names match")
    return parser.parse_known_args(argv)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a pattern: {error}") from None
    return text


def read_suite(path: str) -> dict[str, dict[str, Any]]:
    """The entries of a file, checked as far as that goes without running them.

    Raises:
      ConfigError: the file cannot be run, or is no dictionary of entries.
    """
    entries = run_file(pathlib.Path(path))
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(f"{path}: get_config() must return a dictionary of entries, at least one")
    for name, entry in entries.items():
        if not re.fullmatch(r"[\w.-]+", str(name)) or name == "features":
            raise ConfigError(
                f"{path}: the name {name!r} must be one of a folder: letters, digits, _ . - (and "
                "not features)"
            )
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(k), str) for k in _OWN):
            raise ConfigError(
                f'{path}: {name} must be {{"task": NAME, "data": PATH}} and any flags of the task'
            )
    return {str(name): dict(entry) for name, entry in entries.items()}


def entry_argv(entry: Mapping[str, Any], *, flags: argparse.Namespace, name: str) -> list[str]:
    """The command line of an entry: its data lie in the suite's folder, its keys are flags.

    True stands for a flag without a value, False and None for one that is left out, a list for
    several values, a dictionary for the flag once with each NAME=VALUE. In texts `{data}` and
    `{out}` are the suite's folders, in full: a task's relative paths start at its own data.
    """
    folders = {"{data}": flags.data, "{out}": str(flags.out)}

    def text(value: Any) -> str:
        value = str(value)
        for name, folder in folders.items():
            full = folder if "://" in folder else os.path.abspath(os.path.expanduser(folder))
            value = value.replace(name, full)
        return value

    data = entry["data"]
    if not data.startswith(("hf:", "tfds:")):
        data = os.path.join(flags.data, data)
    argv = ["--data", data, "--model", flags.model, "--out", str(flags.out / name)]
    argv += ["--cache", str(flags.cache or flags.out / "features")]
    for key, value in entry.items():
        flag = f"--{key.replace('_', '-')}"
        if key in _OWN or value is None or value is False:
            continue
        if isinstance(value, Mapping):
            argv += [word for name, x in value.items() for word in (flag, f"{name}={text(x)}")]
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            argv += [flag, *(text(x) for x in values if x is not True)]
    return argv


def run_suite(argv: Sequence[str], *, find_task: Callable[[str], Task]) -> list[str]:
    """Runs all entries, one after the other, and writes one table of what is there.

    An entry that fails is said and skipped; all are parsed before the first runs, so that a wrong
    flag is known at once. With `--only` the table has the results of the other entries too;
    an entry that failed is not in it.

    Args:
      argv: of the command, after "suite".
      find_task: a task by name.

    Returns:
      What went wrong, a line for each entry.

    Raises:
      ValueError, OSError: a wrong file or flag; the disk is full.
      HostError: an entry failed on some processes and not on others.
    """
    flags, common = parse_suite(argv)
    entries, parsed = read_suite(flags.config), {}
    for name, entry in entries.items():
        if not re.search(flags.only, name):
            continue
        words = [*entry_argv(entry, flags=flags, name=name), *common]
        try:
            parsed[name] = make_parser(find_task(entry["task"])).parse_args(words)
        except ValueError as error:
            raise ConfigError(f"{flags.config}: {name}: {error}") from error
    if not parsed:
        raise ConfigError(f"--only {flags.only} must match a name of {flags.config}; none does")
    # Before the model is loaded: processes cannot join each other once they use their devices.
    distributed.initialize(next(iter(parsed.values())).distributed)
    say = print if distributed.is_primary() else lambda *_, **__: None
    models: dict[tuple, Model] = {}
    failures = {}
    for number, (name, entry_flags) in enumerate(parsed.items(), 1):
        say(f"[{number}/{len(parsed)}] {name}")
        key = tuple(getattr(entry_flags, flag) for flag in _MODEL_FLAGS)
        try:
            if key not in models:
                models = {key: load_model(entry_flags)}  # one at a time: they may be large
            run_task(entry_flags, model=models[key])
        except (ValueError, OSError, ModuleNotFoundError, distributed.HostError) as error:
            if is_disk_full(error):
                raise
            distributed.check_all_failed(name, error)
            failures[name] = f"{name}: {' '.join(str(error).split())}"
            say(f"left out: {failures[name]}")
    # What lies in the folder of an entry that failed may be the result of another request.
    left = [name for name in entries if name not in failures]
    found = {name: record for name in left if (record := read_record(flags.out / name))}
    if found:
        table = distributed.on_primary(lambda: write_tables(flags.out, found))
        say(f"\n{table}", end="")
    return list(failures.values())
