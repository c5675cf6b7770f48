"""What decides at small scale: configs/small.py with one thing changed at a time, several seeds.

    python -m benchmarks.ablations run RUNS --data FOLDER [--only REGEX] [--seeds 0 1] [--jobs 2]
    python -m benchmarks.ablations evaluate RUNS [--data FOLDER] [--segmentation F] [--retrieval F]
    python -m benchmarks.ablations table RUNS
    python -m benchmarks.ablations curves RUNS --only REGEX --picture curves.png

FOLDER of `run` holds train.tar and val.tar. Every run is a workdir of its own below RUNS: stopped
and started again, `run` goes on, and leaves what is finished.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np

from benchmarks.changes import CHANGES, PLAIN
from dinov2_jax.metrics import lines_left

ROOT = pathlib.Path(__file__).resolve().parent.parent
BATCH_SIZE = 64
# Measures: key of metrics.jsonl or of a result, and its name in the table.
IN_RUN = {
    "knn/val/cls": "kNN CLS, %",
    "knn/val/mean_patch": "kNN mean patch, %",
    "dino_ce_over_log_k": "DINO / ln K",
    "ibot_ce_over_log_k": "iBOT / ln K",
    "feature_rank": "rank",
}
RESULTS = {
    "leave_one_out_cls": "left-out kNN CLS, %",
    "leave_one_out_mean_patch": "left-out kNN mean patch, %",
    "miou_knn": "patch k-NN mIoU, %",
    "map": "retrieval mAP, %",
}
CURVES = {
    "knn/val/cls": "kNN of CLS",
    "dino_ce_over_log_k": "DINO cross-entropy / ln K",
    "ibot_ce_over_log_k": "iBOT cross-entropy / ln K",
    "teacher_entropy": "teacher's entropy / ln K",
    "feature_std": "spread of the features",
    "feature_rank": "rank of the features",
}
SHARES = ("knn/val/cls", "knn/val/mean_patch")


def run_all(options) -> None:
    """Trains what is asked for, `jobs` at once, each on cores of its own."""
    names = [name for name in CHANGES if re.search(options.only, name)]
    if not names:
        raise SystemExit(f"error: no change is called {options.only!r}; there are {[*CHANGES]}")
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(options.jobs, len(cores))
    groups = iter(np.array_split(cores, jobs))

    def take_cores() -> None:
        os.sched_setaffinity(0, next(groups).tolist())  # of this thread and what it starts

    with concurrent.futures.ThreadPoolExecutor(jobs, initializer=take_cores) as pool:
        runs = [(name, seed, options) for seed in options.seeds for name in names]
        for done in [pool.submit(train, *run) for run in runs]:
            done.result()


def train(name: str, seed: int, options) -> None:
    """One run, from its last checkpoint; nothing if it is finished."""
    change = CHANGES[name]
    workdir = options.runs / f"{name}-seed{seed}"
    steps = options.images // change.get("global_batch_size", BATCH_SIZE)
    settings = {
        "seed": seed,
        "eval.kind": "knn",
        "data.path": options.data / "train.tar",
        "eval.bank_path": options.data / "train.tar",
        "eval.query_path": options.data / "val.tar",
        "eval.name": "val",
        "total_steps": steps,
        "eval_every_steps": max(steps // options.evaluations, 1),
        **change,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = f"--config={ROOT / 'configs' / 'small.py'}"
    command = [sys.executable, "-m", "dinov2_jax.train", config, f"--workdir={workdir}", *flags]
    log = options.runs / f"{workdir.name}.log"
    options.runs.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    last = log.read_text().strip().splitlines()[-1:]
    print(f"{workdir.name}: exit code {done.returncode}: {''.join(last)}", flush=True)


def evaluate(options) -> None:
    """Left-out kNN, patch k-NN segmentation and retrieval of every finished run's teacher."""
    tasks = {}
    if options.segmentation:
        tasks["segmentation"] = [
            *("--data", options.segmentation, "--protocol", "knn", "--bank-patches", "30000"),
            *("--short-side", "176", "--ignore", "11"),
        ]
    if options.retrieval:
        tasks["retrieval"] = ["--data", options.retrieval, "--size", "64", "--resize", "64"]
    finished = [path for path in sorted(options.runs.glob("*-seed*")) if measures(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if options.data and finished:
        command = [sys.executable, "-m", "benchmarks.leave_one_out", *map(str, finished)]
        command += ["--data", str(options.data / "train.tar")]
        subprocess.run(command, check=True, env=environment)
    for workdir in finished:
        for task, flags in tasks.items():
            out = workdir / "evals" / task
            command = [sys.executable, "-m", "dinov2_jax.evals", task, f"--out={out}"]
            command += [f"--model={workdir}", *map(str, flags)]
            subprocess.run(command, check=True, env=environment)


def config(workdir: pathlib.Path) -> dict:
    """That a run was made with."""
    return json.loads((workdir / "config.json").read_text())


def measures(workdir: pathlib.Path) -> dict[str, float]:
    """Of a finished run, by their names in the table; {} of another."""
    rows = lines_left(workdir)
    last = {key: row[key] for row in rows for key in IN_RUN if key in row}
    # Its last evaluation comes after all else; of one before it the numbers are not the run's.
    evaluated = [row["step"] for row in rows if SHARES[0] in row]
    if not evaluated or evaluated[-1] < config(workdir)["total_steps"]:
        return {}
    # What was not finite is null.
    last = {key: np.nan if x is None else x for key, x in last.items()}
    found = {IN_RUN[key]: x * (100 if key in SHARES else 1) for key, x in last.items()}
    for record in workdir.glob("evals/*/result.json"):
        metrics = json.loads(record.read_text())["metrics"]
        found |= {RESULTS[key]: x for key, x in metrics.items() if key in RESULTS}
    return found


def table(runs: pathlib.Path) -> str:
    """Markdown: every change's mean over its seeds, and by how much it differs from plain.

    A difference is the mean over the seeds that both have, with the smallest and the largest.
    """
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in CHANGES}
    for workdir in sorted(runs.glob("*-seed*")):
        name, _, seed = workdir.name.rpartition("-seed")
        if name in found:
            found[name] |= {int(seed): x} if (x := measures(workdir)) else {}
    names = [*IN_RUN.values(), *RESULTS.values()]
    lines = ["| | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for change, seeds in found.items():
        if not seeds:
            continue
        cells = []
        for name in names:
            values = [x[name] for x in seeds.values() if name in x]
            both = [(x, found[PLAIN].get(seed, {})) for seed, x in seeds.items()]
            apart = [x[name] - plain[name] for x, plain in both if name in x and name in plain]
            cell = f"{np.mean(values):.3g}" if values else ""
            if apart and change != PLAIN:
                cell += f" ({np.mean(apart):+.2g}: {min(apart):+.2g} to {max(apart):+.2g})"
            cells.append(cell)
        lines.append(f"| {change} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(options) -> None:
    """Draws what the metrics of the chosen runs say on the way, finished or not."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = f"error: curves needs {error.name}; pip install -e '.[benchmarks]'"
        raise SystemExit(message) from error
    workdirs = [path.parent for path in sorted(options.runs.glob("*/metrics.jsonl"))]
    workdirs = [path for path in workdirs if re.search(options.only, path.name)]
    figure = Figure(figsize=(9, 4.5), dpi=80, layout="constrained")
    for ax, key in zip(figure.subplots(2, 3).flat, CURVES, strict=True):
        for workdir in workdirs:
            batch_size = config(workdir)["global_batch_size"]
            found = [row for row in lines_left(workdir) if row.get(key) is not None]
            points = [(row["step"] * batch_size, row[key]) for row in found]
            if points:
                ax.plot(*zip(*points, strict=True), label=workdir.name, linewidth=1)
        ax.set_title(CURVES[key], fontsize="small")
    figure.supxlabel("images", fontsize="small")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(options.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("run", "evaluate", "table", "curves"))
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, help="folder of train.tar and val.tar")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the changes' names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=38_400, help="a run sees (default 38,400)")
    parser.add_argument("--evaluations", type=int, default=1, help="during a run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--segmentation", help="folder of images and masks")
    parser.add_argument("--retrieval", help="folder with list.json")
    parser.add_argument("--picture", default="curves.png", help="of curves; .png or .svg")
    options = parser.parse_args()
    if options.what == "run":
        if options.data is None:
            parser.error("run needs --data, a folder with train.tar and val.tar")
        run_all(options)
    elif options.what == "evaluate":
        evaluate(options)
    elif options.what == "curves":
        return curves(options)
    print(table(options.runs))


if __name__ == "__main__":
    main()
