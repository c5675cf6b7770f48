"""The house rules that a machine can check: who may import whom, and how long a file is."""

import ast
import pathlib
import subprocess
import sys

import pytest

from dinov2_jax.config import REPOSITORY

PACKAGE = REPOSITORY / "dinov2_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the inside out: a file imports from its own level and those before it only. A name stands
# for a file, or for a whole room.
LEVELS = (
    ("data", "cost", "beside", "arguments", "faults"),
    (
        "losses",
        "optim",
        "models",
        "convert",
        "advice",
        "augment",
        "neighbors",
        "neighbors_plan",
        "config_rules",
        "preprocess",
    ),
    ("sharding", "config", "hub", "alarm", "distributed", "exchange", "signals", "preemption"),
    ("storage", "object_stores"),
    ("model", "compiler"),
    ("export",),
    ("train_state",),
    ("objective",),
    (
        "goodput",
        "speed",
        "train_step",
        "checkpoints",
        "flags",
        "metrics",
        "guards",
        "progress",
        "teacher_file",
        "workdir",
        "commands",
        "feed",
        "rhythm",
    ),
    ("features",),
    ("evals", "visualize", "report"),
    ("loop", "startup_heads", "startup", "startup_table"),
    ("inputs",),
    ("workload", "preview"),
    ("train", "compile"),
)
# What may be imported from a later level, and why.
EXCEPTIONS = {
    ("models", "sharding"): "activations are constrained where they are made",
    ("losses", "sharding"): "likewise",
}
# The only files that see a ConfigDict: below the door, arguments are plain.
DOOR = {
    "config.py",
    "config_rules.py",
    "startup.py",
    "startup_heads.py",
    "startup_table.py",
    "inputs.py",
    "train.py",
    "workload.py",
    "preview.py",
    "compile.py",
}


def _room(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def _imports(path: pathlib.Path) -> set[str]:
    """Full names of what a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _level(room: str) -> int:
    for number, rooms in enumerate(LEVELS):
        if room in rooms:
            return number
    raise AssertionError(f"{room} has no level in tests/test_layout.py; give it one")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_inwards(path):
    room = _room(path)
    if room in ("__init__", "__main__"):
        return
    for name in _imports(path):
        if not name.startswith("dinov2_jax."):
            continue
        other = name.split(".")[1]
        if (PACKAGE / other).exists() or (PACKAGE / f"{other}.py").exists():
            allowed = _level(other) <= _level(room) or (room, other) in EXCEPTIONS
            assert allowed, f"{path.relative_to(PACKAGE)} imports {name}"


def test_data_never_imports_jax():
    for path in (PACKAGE / "data").rglob("*.py"):
        heavy = {name.split(".")[0] for name in _imports(path)} & {"jax", "flax", "optax", "orbax"}
        assert not heavy, f"{path} imports {heavy}"
    # Nor by way of something else that it imports.
    program = (
        "import sys, pkgutil, importlib, dinov2_jax.data as data\n"
        "for module in pkgutil.iter_modules(data.__path__):\n"
        "    importlib.import_module(f'dinov2_jax.data.{module.name}')\n"
        "assert 'jax' not in sys.modules\n"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_the_package_itself_imports_nothing_heavy():
    program = (
        "import sys, dinov2_jax\nassert not {'jax', 'numpy', 'flax', 'grain'} & set(sys.modules)"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_config_stops_at_the_door():
    for path in FILES:
        if (path.name in DOOR and path.parent == PACKAGE) or path.name == "__main__.py":
            continue
        assert not [n for n in _imports(path) if n.startswith("ml_collections")], path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                reads_config = node.value.id == "config" and node.attr not in ("update",)
                assert not reads_config, f"{path}:{node.lineno} reads config.{node.attr}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    if path.name == "__init__.py" and not text.strip():
        return
    assert text.count("\n") <= 300, f"{path} has {text.count(chr(10))} lines: split it"
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, f"{path} has no docstring"
    limit = 30 if path.name == "__init__.py" else 9
    assert docstring.count("\n") + 1 <= limit, f"{path}: shorten the docstring"
