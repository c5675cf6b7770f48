"""Images per second of a whole training run, data included, beside lightly-train's DINOv2.

Both train ViT-S/14 on the same JPEGs: 2 x 224 and 8 x 98 px, separate heads, Sinkhorn-Knopp,
float32. Runs of two lengths are subtracted: what starts, compiles, saves and draws cancels out.

    python -m benchmarks.end_to_end [FOLDER] --lightly-python VENV/bin/python
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.data import write_photos
from benchmarks.turns import limit_threads, median_ratios, take_turns

ROOT = pathlib.Path(__file__).resolve().parent.parent
BOTTLENECK = 256  # lightly-train's, of both heads


def link_images(folder: str, links: pathlib.Path, count: int) -> None:
    """At least `count` files, all different by name, so that a run is one epoch."""
    images = [p for p in sorted(pathlib.Path(folder).rglob("*")) if p.suffix in (".jpg", ".jpeg")]
    if not images:
        raise SystemExit(f"error: no .jpg or .jpeg file in {folder}; give another folder")
    for i in range(max(count, len(images))):
        (links / f"{i:06d}.jpg").symlink_to(images[i % len(images)].resolve())


def run_ours(options, links: str, workdir: str, steps: int) -> list[str]:
    """The command of a run of our trainer."""
    settings = {
        "data.path": links,
        "total_steps": steps,
        "global_batch_size": options.batch_size,
        "group_size": options.batch_size,
        "mesh.data": 1,
        "model.drop_path_rate": options.drop_path_rate,
        "loader.num_workers": options.workers,
        # After the last step only: by default a longer run saves more often, and that is left over.
        **{f"{what}_every_steps": 0 for what in ("checkpoint", "eval", "teacher")},
        **{f"{head}.num_prototypes": options.prototypes for head in ("dino", "ibot")},
        **{f"{head}.bottleneck_dim": BOTTLENECK for head in ("dino", "ibot")},
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = f"--config={ROOT / 'configs' / 'vits14.py'}"
    return [sys.executable, "-m", "dinov2_jax.train", config, f"--workdir={workdir}", *flags]


def run_lightly(options, links: str, workdir: str, steps: int) -> list[str]:
    """The command of a run of lightly-train."""
    arguments = {
        "workdir": workdir,
        "folder": links,
        "model": "dinov2/vits14-notpretrained",
        "steps": steps,
        "epochs": 1,
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "model_args": {"drop_path_rate": options.drop_path_rate},
        "method_args": {
            "ibot_separate_head": True,
            "output_dim": options.prototypes,
            "center_method": "sinkhorn_knopp",
        },
    }
    script = pathlib.Path(__file__).with_name("lightly_run.py")
    return [options.lightly_python, str(script), json.dumps(arguments)]


def run(command: list[str]) -> np.ndarray:
    """Wall and CPU seconds of a command and of all that it starts, `[2]`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter(), os.times()
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        ended = time.perf_counter(), os.times()
        if done.returncode:
            output.seek(0)
            raise SystemExit(f"error: {command[:3]} failed:\n{output.read()[-3000:]}")
    used = sum(ended[1][2:4]) - sum(started[1][2:4])  # of children, user and system
    return np.array([ended[0] - started[0], used])


def measure(make_command, options, folder: str) -> np.ndarray:
    """Wall and CPU seconds an image, `[2]`."""
    seconds = []
    for steps in options.steps:
        with contextlib.ExitStack() as stack:
            links, workdir = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
            link_images(folder, pathlib.Path(links), options.batch_size * max(options.steps))
            command = make_command(options, links, str(pathlib.Path(workdir) / "run"), steps)
            seconds.append(run(command))
    images = (options.steps[1] - options.steps[0]) * options.batch_size
    return (seconds[1] - seconds[0]) / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", default="", help="of JPEGs; default: photographs")
    parser.add_argument("--lightly-python", default="", help="of an environment with lightly-train")
    parser.add_argument("--steps", type=int, nargs=2, default=[3, 13], help="of the two lengths")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--drop-path-rate", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=0, help="processes that load; 0: none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    limit_threads(options.threads)
    makers = {"ours": run_ours} | ({"lightly-train": run_lightly} if options.lightly_python else {})
    with tempfile.TemporaryDirectory() as photos:
        if not options.folder:
            write_photos(photos, long_side=500)
        contenders = {
            name: functools.partial(measure, maker, options, options.folder or photos)
            for name, maker in makers.items()
        }
        seconds = take_turns(contenders, options.rounds, num_warmups=0)
    print(f"{options.threads} threads, {options.rounds} rounds, float32")
    for name, rows in seconds.items():
        wall, cpu = np.median(rows, axis=0)
        wall_ratio, cpu_ratio = median_ratios(seconds, name)
        print(
            f"{name:14} {1 / wall:6.2f} images/s, {cpu:6.3f} CPU s/image; "
            f"ours is {wall_ratio:.2f} times as fast, {cpu_ratio:.2f} by CPU time"
        )


if __name__ == "__main__":
    main()
