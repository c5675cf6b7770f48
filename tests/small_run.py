"""The quickstart, shrunk until a run takes seconds: what the tests of the command share."""

import json
import os
import subprocess
import sys

from etils import epath

from dinov2_jax.config import REPOSITORY
from dinov2_jax.metrics import TIMING_FIELDS, MetricsWriter, read_metrics
from dinov2_jax.train import main

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.py")
SHRINK = {
    "total_steps": 12,
    "global_batch_size": 4,
    "group_size": 4,
    "crops.global_crop_size_px": 16,
    "crops.local_crop_size_px": 8,
    "crops.num_local_crops": 2,
    "model.embed_dim": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.drop_path_rate": 0.25,
    "dino.num_prototypes": 16,
    "dino.hidden_dim": 16,
    "dino.bottleneck_dim": 8,
    "ibot.num_prototypes": 16,
    "ibot.hidden_dim": 16,
    "ibot.bottleneck_dim": 8,
    "log_every_steps": 2,
    "checkpoint_every_steps": 4,
    "eval_every_steps": 4,
    "teacher_every_steps": 8,
    "eval.crop_size_px": 16,
    "eval.crops_per_image": 2,
    "eval.num_neighbors": 2,
    "loader.num_threads": 2,
    "pictures": "false",
    "tensorboard": "false",
}


def arguments(workdir: epath.PathLike, *extra: str, **overrides) -> list[str]:
    """Arguments of the command; overrides replace those of `SHRINK` ("__" stands for ".")."""
    keys = SHRINK | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return [f"--config={QUICKSTART}", f"--workdir={workdir}", *flags, *extra]


def run(workdir: epath.PathLike, *extra: str, **overrides) -> int:
    """Runs the command in this process; returns its exit code."""
    return main(arguments(workdir, *extra, **overrides))


def start(workdir: epath.PathLike, cache: epath.PathLike, **overrides) -> subprocess.Popen:
    """Starts the command in a process of its own, with a compilation cache."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "dinov2_jax.train", *arguments(workdir, **overrides)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def repeatable(workdir: epath.PathLike) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = read_metrics(epath.Path(workdir) / "metrics.jsonl")
    return [{key: x for key, x in line.items() if key not in TIMING_FIELDS} for line in lines]


def written_config(workdir: epath.PathLike) -> dict:
    """config.json."""
    return json.loads((epath.Path(workdir) / "config.json").read_text())


def after_line(monkeypatch, step: int, action):
    """Calls `action` once, right after the log line of a step is written."""
    write, done = MetricsWriter.write, []

    def wrapped(self, at, values):
        write(self, at, values)
        if at == step and "total_loss" in values and not done:
            done.append(at)
            action()

    monkeypatch.setattr(MetricsWriter, "write", wrapped)
