"""What a GPU does with a training step: time, MFU, memory, variants, and the wait for data.

ViT-S, B and L in bfloat16, 65,536 prototypes, one GPU, each way of attention and heads beside the
default, where it is another. No row begins that would end after --limit-secs if it took as long as
the longest of its model so far, or of any model; a model's first may take longer. `--tiny` proves
on any machine that the script works.

    python -m benchmarks.gpu
"""

import argparse
import dataclasses
import gc
import itertools
import os
import time

import numpy as np

from benchmarks.contenders import load, make_batch
from benchmarks.turns import timed
from dinov2_jax.cost.chips import chip_of

PROTOTYPES = {"dino.num_prototypes": 65_536, "ibot.num_prototypes": 65_536}
MODELS = {"S": ("vits14", 128), "B": ("vitb14", 64), "L": ("vitl14", 32)}
TINY = {"model.depth": 2, "global_batch_size": 8, "group_size": 8}
VARIANTS = {
    "default": {},
    "attention=xla": {"attention": "xla"},
    "attention=cudnn": {"attention": "cudnn"},
    "heads=dense": {"heads": "dense"},
    "heads=blocks": {"heads": "blocks"},
    "remat=dots": {"remat": "dots"},
    "gpu_overlap": {"compiler_preset": "gpu_overlap"},
}


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one step; MFU are shares of the peak in bfloat16, None where the board is not known."""

    step_secs: float
    images_per_sec: float
    model_mfu: float | None
    executed_mfu: float | None
    memory_mb: float  # arguments and temporaries, by the compiler's books

    def __str__(self) -> str:
        mfu = ""
        if self.model_mfu is not None:
            mfu = f"MFU {self.model_mfu:.1%}, executed {self.executed_mfu:.1%}, "
        return (
            f"{1e3 * self.step_secs:8.1f} ms, {self.images_per_sec:7.1f} images/s, {mfu}"
            f"{self.memory_mb:6.0f} MB"
        )


def peak_flops(device_kind: str) -> float | None:
    """A second, of a device such as "NVIDIA H100 80GB HBM3", in bfloat16; None: not known."""
    chip = chip_of(device_kind)
    return chip.peak_flops if chip else None


def mfu_note(device_kind: str) -> str | None:
    """Why there is no MFU on such a device; None where there is."""
    if peak_flops(device_kind):
        return None
    return (
        f"no MFU: the peak of {device_kind} is not known, and other boards of its name may have "
        "another; add it to dinov2_jax/cost/chips.py"
    )


class Step:
    """A compiled step with its state; calling it takes one and waits for it."""

    def __init__(self, config):
        import jax

        from dinov2_jax import startup
        from dinov2_jax.sharding import batch_sharding
        from dinov2_jax.workload import count_flops

        self.config, self.mesh = config, startup.build_mesh(config)
        self.trainer = startup.build_trainer(config, self.mesh)
        self.flops = count_flops(config, self.trainer.network)
        self.hyper = self.trainer.schedules.at(config.total_steps // 2)
        with jax.set_mesh(self.mesh):
            self.batch = jax.device_put(make_batch(config), batch_sharding(self.mesh))
            self.state = self.trainer.init()
            arguments = (self.state, self.batch, self.hyper)
            self.compiled = self.trainer.train_step.lower(*arguments).compile()

    def __call__(self) -> None:
        self.take(self.batch)

    def take(self, batch) -> None:
        self.state, metrics = self.compiled(self.state, batch, self.hyper)
        metrics["total_loss"].block_until_ready()

    def figures(self, num_steps: int) -> Figures:
        """Medians over steps, after one that warms up."""
        secs = float(np.median([timed(self)[0] for _ in range(num_steps + 1)][1:]))
        peak = peak_flops(self.mesh.devices.flat[0].device_kind)
        memory = self.compiled.memory_analysis()
        return Figures(
            step_secs=secs,
            images_per_sec=self.config.global_batch_size / secs,
            model_mfu=peak and self.flops.model / secs / peak,
            executed_mfu=peak and self.flops.executed / secs / peak,
            memory_mb=(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6,
        )


def data_wait_share(step: Step, path: str, num_steps: int) -> float:
    """Share of the time that a run on real images waits for them, by the trainer's own feed."""
    import jax

    from dinov2_jax import inputs
    from dinov2_jax.data.sources import open_source
    from dinov2_jax.feed import Feed

    config = step.config
    with (
        jax.set_mesh(step.mesh),
        inputs.open_batches(config, open_source(path), step.mesh, start_step=0) as batches,
    ):
        feed = Feed(batches, step.mesh, num_groups=config.global_batch_size // config.group_size)
        step.take(feed.take().device)  # the workers have started
        started, feed.wait_secs = time.perf_counter(), 0.0
        for _ in range(num_steps):
            step.take(feed.take().device)
        return feed.wait_secs / (time.perf_counter() - started)


def choices(config) -> tuple:
    """What a run of a configuration has of all that variants change, each "auto" decided."""
    from dinov2_jax import startup, startup_heads, startup_table
    from dinov2_jax.compiler import choose_preset

    mesh = startup.build_mesh(config)
    device = mesh.devices.flat[0]
    backbone = startup.build_network(config, device).backbone
    return (
        startup_table.describe_attention(config, backbone, mesh),
        startup_heads.build_heads(config, mesh),
        backbone.remat,
        choose_preset(config.compiler_preset, platform=device.platform),
    )


def print_row(model: str, variant: str, options) -> None:
    """Measures a row; what it held on the device is free when it returns."""
    config_name, batch_size = MODELS[model]
    overrides = {"global_batch_size": batch_size, "group_size": batch_size} | PROTOTYPES
    if options.tiny:
        config_name, overrides = "quickstart", TINY
    overrides = overrides | {"mesh.data": 1, "loader.num_workers": options.workers}
    row, config = f"{model} {variant:16}", load(config_name, overrides | VARIANTS[variant])
    try:
        if variant != "default" and choices(config) == choices(load(config_name, overrides)):
            print(f"{row} is the default", flush=True)
            return
        step = Step(config)
        print(f"{row} {step.figures(options.steps)}", flush=True)
    # A way that this device does not have, or has no memory for, is a row that says so.
    except (ValueError, RuntimeError) as error:
        print(f"{row} not here: {str(error).splitlines()[0]}", flush=True)
        return
    if variant == "default":
        share = data_wait_share(step, options.data, options.steps)
        print(f"{model} waits for data {share:.1%} of the time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--data", default="photos:", help="source of the wait for data")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--limit-secs", type=float, default=420, help="no row begins that may end after it"
    )
    parser.add_argument("--tiny", action="store_true", help="the quickstart's sizes, 2 blocks")
    options = parser.parse_args()
    import jax

    started = time.perf_counter()
    device_kind = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device_kind}, {options.steps} steps a row")
    if note := mfu_note(device_kind):
        print(note)
    longest = {}  # seconds of a row, by model
    # Every model by default before any variant: the time may not last for all.
    for variant, model in itertools.product(options.variants, options.models):
        began = time.perf_counter()
        left = options.limit_secs - (began - started)
        if left < longest.get(model, max(longest.values(), default=0)):
            print(f"{model} {variant:16} left out: {max(left, 0):.0f} s are left", flush=True)
            continue
        print_row(model, variant, options)
        # Also of what an error's traceback holds: two states at once may not fit.
        gc.collect()
        longest[model] = max(longest.get(model, 0), time.perf_counter() - began)


if __name__ == "__main__":
    main()
