"""What is learnt, over images and over minutes, beside lightly-train's DINOv2: two kNN curves.

Both train on the same images, at the same crops and batch, in float32, side by side on half of the
cores each. Ours is configs/small.py; lightly-train has the smallest model that it offers (ViT-S/14)
and is given the recipe's settings wherever it has them: crops, colours, heads, losses, schedules.

    python -m benchmarks.learning run OUT --data FOLDER --lightly-python VENV/bin/python --steps N M
    python -m benchmarks.learning plot OUT --picture learning.png

FOLDER holds train.tar and val.tar, labelled; labels are used by kNN alone. N and M are the steps of
ours and of theirs: choose them for the same minutes, which are printed.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np

from dinov2_jax.data.multicrop import BLUR_PROBABILITY

ROOT = pathlib.Path(__file__).resolve().parent.parent
SET = "val"
GLOBAL_PX, LOCAL_PX = 56, 28  # of the crops; multiples of both networks' patches
PATCH_PX = 7  # ours; lightly-train's is 14
EVALUATIONS = 6


def train_ours(options, workdir: pathlib.Path, steps: int) -> None:
    """Trains our recipe, with the in-run kNN."""
    settings = {
        "data.path": options.data / "train.tar",
        "total_steps": steps,
        "crops.global_crop_size_px": GLOBAL_PX,
        "crops.local_crop_size_px": LOCAL_PX,
        "model.patch_size": PATCH_PX,
        "eval.kind": "knn",
        "eval.name": SET,
        "eval.bank_path": options.data / "train.tar",
        "eval.query_path": options.data / "val.tar",
        "eval.resize_size_px": GLOBAL_PX,
        "eval.crop_size_px": GLOBAL_PX,
        "eval_every_steps": max(steps // EVALUATIONS, 1),
        "log_every_steps": 1,
        "dtype": "float32",
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = f"--config={ROOT / 'configs' / 'small.py'}"
    run([sys.executable, "-m", "dinov2_jax.train", config, f"--workdir={workdir}", *flags], workdir)


def curve_of_ours(workdir: pathlib.Path, options) -> list[dict]:
    """Points of a run's metrics.jsonl; compilation counts as training, evaluation does not."""
    points, seconds, batch = [], 0.0, recipe().global_batch_size
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        if "secs/step" in line:
            kinds = ("compile", "step", "data_wait", "checkpoint")
            seconds = sum(line[f"secs/{kind}"] for kind in kinds)
        if f"knn/{SET}/cls" in line:
            found = {kind: line[f"knn/{SET}/{kind}"] for kind in ("cls", "mean_patch")}
            points.append({"images": line["step"] * batch, "seconds": seconds} | found)
    return points


def train_lightly(options, workdir: pathlib.Path, steps: int) -> None:
    """Trains lightly-train's DINOv2; the teachers on the way are kept as files."""
    config = recipe()
    arguments = {
        "workdir": str(workdir),
        "folder": str(options.out / "images"),
        "model": "dinov2/vits14-notpretrained",
        "steps": steps,
        "batch_size": config.global_batch_size,
        "num_workers": 0,
        "snapshot_every": max(steps // EVALUATIONS, 1),
        "model_args": {
            "drop_path_rate": config.model.drop_path_rate,
            "init_values": config.model.layer_scale_init,
        },
        "optim_args": {"lr": config.optim.base_learning_rate},
        "transform_args": transforms(config),
        "method_args": {
            "ibot_separate_head": True,
            "center_method": "sinkhorn_knopp",
            "output_dim": config.dino.num_prototypes,
            "hidden_dim": config.dino.hidden_dim,
            "dino_bottleneck_dim": config.dino.bottleneck_dim,
            "momentum_start": config.teacher.momentum_start,
            "momentum_end": config.teacher.momentum_end,
            "min_lr": config.optim.min_learning_rate,
            "teacher_temp_start": config.centering.teacher_temp_start,
            "teacher_temp_end": config.centering.teacher_temp,
            "teacher_temp_warmup_steps": 1,
            "warmup_steps": max(steps // 20, 1),
            "student_freeze_last_layer_steps": steps // 100,
            "reference_batch_size": config.global_batch_size,  # no scaling, as in the recipe
            "layerwise_decay": config.optim.layerwise_lr_decay,
            "patch_embed_lr_multiplier": config.optim.patch_embed_lr_multiplier,
            "weight_decay_end": config.optim.weight_decay_end,
        },
    }
    (workdir / "snapshots.jsonl").unlink(missing_ok=True)  # of a run before
    script = pathlib.Path(__file__).with_name("lightly_run.py")
    run([options.lightly_python, str(script), json.dumps(arguments)], workdir)


def recipe():
    """configs/small.py."""
    from dinov2_jax.config import load_config

    return load_config(str(ROOT / "configs" / "small.py"), [], needs_data=False)


def transforms(config) -> dict:
    """Crops and colours, in lightly-train's words."""
    crops, augment = config.crops, config.augment
    blurs = [
        {"prob": probability, "sigmas": augment.blur_sigma_px}
        for probability in augment.blur_probability or BLUR_PROBABILITY[augment.mode]
    ]
    return {
        "image_size": (GLOBAL_PX, GLOBAL_PX),
        "random_resize": scale(crops.global_crop_scale),
        "color_jitter": {
            "prob": augment.jitter_probability,
            "strength": 1.0,
            "brightness": augment.brightness,
            "contrast": augment.contrast,
            "saturation": augment.saturation,
            "hue": augment.hue,
        },
        "random_gray_scale": augment.grayscale_probability,
        "gaussian_blur": blurs[0],
        "global_view_1": {"gaussian_blur": blurs[1]},  # solarizes as the recipe does
        "local_view": {
            "num_views": crops.num_local_crops,
            "view_size": (LOCAL_PX, LOCAL_PX),
            "random_resize": scale(crops.local_crop_scale),
            "gaussian_blur": blurs[2],
        },
    }


def scale(shares: tuple[float, float]) -> dict[str, float]:
    """A crop's shares of the area, in lightly-train's words."""
    return {"min_scale": shares[0], "max_scale": shares[1]}


def curve_of_lightly(workdir: pathlib.Path, options) -> list[dict]:
    """kNN of every snapshot by the evaluation that our runs have."""
    import dinov2_jax
    from dinov2_jax.data.sources import open_source
    from dinov2_jax.evals.in_run import labelled_knn

    points, evaluation = [], None
    for row in map(json.loads, (workdir / "snapshots.jsonl").read_text().splitlines()):
        model = dinov2_jax.load(row["file"])
        if evaluation is None:
            evaluation = labelled_knn(
                name=SET,
                bank=open_source(str(options.data / "train.tar")),
                queries=open_source(str(options.data / "val.tar")),
                apply=model.apply,
                mean=model.spec.mean,
                std=model.spec.std,
                resize_size_px=GLOBAL_PX,
                crop_size_px=GLOBAL_PX,
            )
        found = {name.rsplit("/", 1)[1]: x for name, x in evaluation(model.params).items()}
        points.append({"images": row["images"], "seconds": row["seconds"]} | found)
    return points


def run(command: list[str], workdir: pathlib.Path) -> None:
    """Runs on this process's share of the cores; what it says is beside the workdir."""
    cores = os.sched_getaffinity(0)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(len(cores))}
    log = workdir.with_suffix(".log")
    with open(log, "w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"error: {command[:3]} failed:\n{log.read_text()[-3000:]}")


CONTENDERS = {
    "ours": (train_ours, curve_of_ours),
    "lightly-train": (train_lightly, curve_of_lightly),
}


def measure(options) -> None:
    """Trains both at once and writes their curves."""
    options.out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(options.data / "train.tar") as images:
        images.extractall(options.out / "images", filter="data")
    names = [name for name in CONTENDERS if name == "ours" or options.lightly_python]
    cores = sorted(os.sched_getaffinity(0))
    shares = itertools.cycle(np.array_split(cores, min(len(names), len(cores))))

    def train(name: str, steps: int, mine: np.ndarray) -> None:
        os.sched_setaffinity(0, {int(core) for core in mine})  # of this thread and what it starts
        CONTENDERS[name][0](options, options.out / name, steps)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [
            pool.submit(train, *x) for x in zip(names, options.steps, shares, strict=False)
        ]:
            done.result()
    for name in names:
        points = CONTENDERS[name][1](options.out / name, options)
        rows = "".join(json.dumps(point) + "\n" for point in points)
        (options.out / f"{name}.jsonl").write_text(rows)


def read(out: pathlib.Path) -> dict[str, list[dict]]:
    """The curves that were measured."""
    files = {name: out / f"{name}.jsonl" for name in CONTENDERS}
    return {
        name: [json.loads(line) for line in file.read_text().splitlines()]
        for name, file in files.items()
        if file.exists()
    }


def plot(curves: dict[str, list[dict]], path: str) -> None:
    """kNN of CLS over images and over minutes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = f"error: plot needs {error.name}; pip install -e '.[benchmarks]'"
        raise SystemExit(message) from error
    figure = Figure(figsize=(8, 3), dpi=80, layout="constrained")
    for ax, key, unit in zip(
        figure.subplots(1, 2), ("images", "seconds"), (1_000, 60), strict=True
    ):
        for name, points in curves.items():
            ax.plot([p[key] / unit for p in points], [100 * p["cls"] for p in points], label=name)
        ax.set_xlabel({"images": "thousand images", "seconds": "minutes"}[key])
    figure.axes[0].set_ylabel("kNN of CLS, %")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("run", "plot"))
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, help="folder of train.tar and val.tar")
    parser.add_argument("--lightly-python", default="", help="of an environment with lightly-train")
    parser.add_argument("--steps", type=int, nargs=2, default=[600, 60], help="ours, lightly-train")
    parser.add_argument("--picture", default="learning.png", help="of plot; .png or .svg")
    options = parser.parse_args()
    if options.what == "run":
        if options.data is None:
            parser.error("run needs --data, a folder with train.tar and val.tar")
        measure(options)
    curves = read(options.out)
    for name, points in curves.items():
        for p in points:
            print(
                f"{name:14} {p['images']:7} images {p['seconds'] / 60:6.1f} minutes  "
                f"kNN CLS {p['cls']:.1%}  mean patch {p['mean_patch']:.1%}"
            )
    if options.what == "plot":
        plot(curves, options.picture)


if __name__ == "__main__":
    main()
