"""One task by its flags: the flags that all tasks share, and what is done around each.

A result that is there already, made by the same request, is shown and not made again.
"""

import argparse
import os
import pathlib
import resource
import time
from typing import Any

from dinov2_jax import __version__, distributed
from dinov2_jax.arguments import Parser, count, positive
from dinov2_jax.evals.networks import load_network
from dinov2_jax.evals.paper import datasets
from dinov2_jax.evals.results import entry_name, read_record, rows, to_markdown, write_record
from dinov2_jax.evals.task import Run, Task
from dinov2_jax.model import Model

# Of speed alone, or of where things lie: not part of what was asked for.
_FREE_FLAGS = (
    *("task", "out", "cache", "batch_size", "threads", "force", "distributed", "save_every"),
)


def out_folder(text: str) -> pathlib.Path:
    """A flag's type: a folder that is written to."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} must be a folder of a disk, not a URL")
    return pathlib.Path(text)


def make_parser(task: Task) -> argparse.ArgumentParser:
    """The common flags and the task's own."""
    parser = Parser(
        prog=f"python -m dinov2_jax.evals {task.name}",
        description=task.summary,
        epilog=f"--data must hold: {task.layout}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(task=task)
    common = parser.add_argument_group("of every task")
    add = common.add_argument
    add(
        "--model",
        required=True,
        help="a file, a folder, a workdir, a name (dinov2_vits14); or a baseline: pixels, "
        "random:dinov2_vits14",
    )
    add("--data", required=True, help="the data set; see below")
    add("--out", required=True, type=out_folder, help="folder of the results")
    add(
        "--dataset",
        help=f"its name in the table, default the folder's; the paper has numbers for "
        f"{', '.join(datasets())}",
    )
    add("--cache", type=out_folder, help="folder of features, to share; default OUT/features")
    add("--blocks", type=positive, metavar="N", help="use the first N blocks of the model alone")
    add("--seed", type=count, default=0, help="of every random choice (default 0)")
    add("--batch-size", type=positive, default=32, help="images at once on each device")
    add("--threads", type=positive, help="that decode; default: one a core, at most 16")
    add("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    add("--tree", choices=("teacher", "student"), default="teacher", help="of our checkpoints")
    add("--interpolation", help="reference, huggingface or timm; default: what the file says")
    add("--num-heads", type=positive, help="default: what the file says, else width / 64")
    add("--force", action="store_true", help="make the result again, in place of what is there")
    add(
        "--distributed",
        default="off",
        choices=distributed.MODES,
        help="whether this is one process of several that share the work (default off); OUT is "
        "then on a disk that all see",
    )
    task.add_flags(parser.add_argument_group("of this task"))
    return parser


def run_task(flags: argparse.Namespace, *, model: Model | None = None) -> dict[str, Any]:
    """Runs a task, or finds it done; writes and returns its record.

    Args:
      flags: of `make_parser`.
      model: loaded before; None: `flags.model` is loaded.

    Raises:
      ValueError, OSError: wrong input, such as a URL where the task reads disks alone; or
        the folder holds the result of another request.
    """
    if "://" in flags.data and not flags.task.reads_urls:
        raise ValueError(
            f"--data {flags.data} must be on a disk for {flags.task.name}: copy it there; "
            "knn, linear and logreg read image folders, tar shards and lists at URLs"
        )
    distributed.initialize(flags.distributed)
    say = print if distributed.is_primary() else lambda *_, **__: None
    model = model or load_model(flags)
    request = _request(flags, model)
    # Together: one that came late would find what the primary had written meanwhile.
    record = distributed.together(lambda: None if flags.force else read_record(flags.out))
    if record is not None:
        _check_same(flags.out, record["request"], request)
        say(f"{flags.out} has this result already; --force makes it again")
    else:
        record = _make(flags, model, request, say)
        distributed.on_primary(lambda: write_record(flags.out, record))
    say(to_markdown(rows({entry_name(flags.out): record})), end="")
    return record


def load_model(flags: argparse.Namespace) -> Model:
    """The model of the common flags."""
    return load_network(
        flags.model,
        num_blocks=flags.blocks,
        seed=flags.seed,
        tree=flags.tree,
        dtype=flags.compute_dtype,
        interpolation=flags.interpolation,
        num_heads=flags.num_heads,
    )


def _make(flags, model: Model, request: dict[str, Any], say) -> dict[str, Any]:
    started, cpu_started = time.perf_counter(), time.process_time()
    dataset = flags.dataset or os.path.basename(os.path.abspath(os.path.expanduser(flags.data)))
    result = flags.task.run(
        Run(
            flags=flags,
            model=model,
            data=flags.data,
            dataset=dataset,
            out=flags.out,
            cache=flags.cache or flags.out / "features",
            seed=flags.seed,
            batch_size=flags.batch_size,
            num_threads=flags.threads,
            say=say,
        )
    )
    return {
        "task": flags.task.name,
        "dataset": dataset,
        "metrics": dict(result.metrics),
        "headline": list(result.headline),
        "protocol": dict(result.protocol),
        "counts": dict(result.counts),
        "model": {
            "name": model.name + (f", {flags.blocks} blocks" if flags.blocks else ""),
            "weights_sha256": model.weights_sha256,
            "variant": model.spec.variant,
            "patch_size": model.spec.patch_size,
            "num_register_tokens": model.spec.num_register_tokens,
            "description": model.spec.describe(),
        },
        "seed": flags.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "version": __version__,
        "request": request,
        "details": dict(result.details),
    }


def _request(flags: argparse.Namespace, model: Model) -> dict[str, Any]:
    asked = {
        name: value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
        for name, value in vars(flags).items()
        if name not in _FREE_FLAGS and name != "model"
    }
    # Pixels of any patch size have the same weights, none: the record tells them apart.
    network = {"network": model.spec.describe(), "weights_sha256": model.weights_sha256}
    return {"task": flags.task.name, **network, **asked}


def _check_same(out: pathlib.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    different = [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if different:
        raise ValueError(
            f"{out} holds the result of another request ({'; '.join(different)}); choose another "
            "--out, or --force to replace it"
        )
