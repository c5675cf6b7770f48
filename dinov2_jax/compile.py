"""Compiles the train step for accelerators that are not there, and says whether it fits.

`python -m dinov2_jax.compile --config=configs/vitg14.py --topology=v5e:16x16`. The very step that
`train` runs, by the very compiler, on any machine; see docs/pods.md for what the estimates mean.
Exit codes: 0 it fits, 1 it does not, 2 wrong input, or a compiler that fails.
"""

import argparse
import json
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence

# Before jax is imported: an accelerator of this machine is none of this command's business.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from dinov2_jax import config as config_lib
from dinov2_jax import sharding, startup, workload
from dinov2_jax.compiler import without_compilation_cache
from dinov2_jax.config_rules import ConfigError
from dinov2_jax.cost.estimate import Estimate, estimate
from dinov2_jax.cost.hlo import Program
from dinov2_jax.cost.memory import CompilerError, memory_of, memory_of_failure
from dinov2_jax.cost.report import print_estimate, print_figures
from dinov2_jax.cost.topology import Topology, TopologyError, open_topology
from dinov2_jax.flags import parse_with_overrides
from dinov2_jax.startup_heads import describe_heads
from dinov2_jax.startup_table import backward_kernels, describe_attention

DOES_NOT_FIT, FAILED = 1, 2
# Without its long search for fast code the compiler takes a fifth of the time and, as far as it was
# looked at, a little more memory.
QUICK = {"optimization_level": 9}  # jax's number of its level O0


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; see `parse_with_overrides`."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov2_jax.compile",
        description="Compiles the train step for a topology without having it.",
        epilog="--config.KEY=VALUE sets any key of configs/base.py, as in train. Exit codes: 0 it "
        "fits, 1 it does not, 2 wrong input, or a compiler that fails.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="such as v5e:16x16, v5p:4x4x8 or cuda:h100:1x8",
    )
    parser.add_argument("--slices", type=int, default=1, help="slices of that shape (default 1)")
    parser.add_argument(
        "--find_max_batch",
        "--find-max-batch",
        action="store_true",
        help="find the largest global_batch_size that fits",
    )
    parser.add_argument(
        "--fits_only",
        action="store_true",
        help="memory alone: no time estimate, in a fifth of the compile time",
    )
    parser.add_argument(
        "--breakdown", action="store_true", help="print what the step's time is spent on"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program there")
    flags = parse_with_overrides(parser, argv)
    if flags.fits_only and flags.breakdown:
        raise ConfigError("--breakdown is of the time, which --fits_only leaves out; drop one")
    for name, file in (("json", flags.json), ("hlo", flags.hlo)):
        # Found out now and not after minutes.
        path = pathlib.Path(file or "figures")
        if not path.parent.is_dir():
            raise ConfigError(f"--{name}={file}: there is no folder {path.parent}; create it")
        if path.is_dir():
            raise ConfigError(f"--{name}={file} is a folder; name a file in it")
        if file and not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"--{name}={file} may not be written; name another file")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; what is wrong with its input is one line on stderr. Returns the code."""
    try:
        flags = parse_flags(sys.argv[1:] if argv is None else argv)
        config = config_lib.load_config(flags.config, flags.overrides, needs_data=False)
        topology = open_topology(flags.topology, num_slices=flags.slices)
        run = find_max_batch if flags.find_max_batch else check
        with without_compilation_cache():
            figures, step = run(config, topology, is_quick=flags.fits_only, hlo_file=flags.hlo)
        print_figures(figures)
        if step is not None:
            print_estimate(figures, step, breakdown=flags.breakdown)
        if flags.json:
            pathlib.Path(flags.json).write_text(json.dumps(figures, indent=2) + "\n")
        return 0 if figures["fits"] else DOES_NOT_FIT
    except (ConfigError, TopologyError, CompilerError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    except Exception:  # which Python ends with 1: that would say that the step does not fit
        traceback.print_exc()
    return FAILED


def check(
    config, topology: Topology, *, is_quick: bool = False, hlo_file: str | None = None
) -> tuple[dict, Estimate | None]:
    """Compiles the step of a configuration, and writes the program to `hlo_file`, if given.

    Returns:
      The figures, by the names that `--json` writes; and the time estimate, if it fits and was
      not `is_quick`.

    Raises:
      ConfigError: the configuration cannot run on these devices.
      CompilerError: the compiler fails, and not for want of memory.
    """
    config = without_cudnn(config, platform=topology.devices[0].platform)
    mesh = startup.build_mesh(config, topology.devices)
    chip = topology.chip
    with jax.set_mesh(mesh):
        trainer = startup.build_trainer(config, mesh)
        batch = workload.abstract_batch(config, mesh)
        arguments = (trainer.abstract_state, batch)
        lowered = trainer.train_step.lower(*arguments, trainer.schedules.at(0))
        started = time.perf_counter()
        try:
            compiled = lowered.compile(QUICK if is_quick else None)
            memory = memory_of(compiled, chip)
        except jax.errors.JaxRuntimeError as error:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments)
            held = sharding.bytes_per_device(arguments, shardings)
            compiled, memory = None, memory_of_failure(str(error), chip, argument_bytes=held)
    flops = workload.count_flops(config, trainer.network)
    num_devices, backbone = mesh.devices.size, trainer.network.backbone
    forms = ("remat", "layer_norm", "drop_path_form")
    figures = {
        "topology": topology.name,
        "slices": topology.num_slices,
        "mesh": dict(mesh.shape),
        **{name: getattr(backbone, name) for name in forms},
        "backward_kernels": backward_kernels(config, trainer),
        "attention": describe_attention(config, backbone, mesh),
        "heads": describe_heads(config, mesh)[0],
        "grad_accumulation_steps": config.grad_accumulation_steps,
        "dtype": str(jnp.dtype(backbone.dtype)),
        "fits": memory.fits,
        "global_batch_size": config.global_batch_size,
        "group_size": config.group_size,
        "num_prototypes": config.dino.num_prototypes,
        "devices": num_devices,
        "chips": num_devices // chip.devices_per_chip,
        "compile_seconds": round(time.perf_counter() - started, 1),
        "hbm_peak_bytes": memory.peak_bytes,
        "hbm_limit_bytes": memory.limit_bytes,
        "hbm_bytes": memory.by_kind,
        "model_flops": flops.model,
        "executed_flops": flops.executed,
        "estimated_step_seconds": None,
        "estimated_mfu": None,
    }
    if compiled is not None and hlo_file:
        pathlib.Path(hlo_file).write_text(compiled.as_text())
    if compiled is None or is_quick:
        return figures, None
    step = estimate(Program(compiled.as_text()), chip)
    figures["collective_bytes"] = step.collective_bytes
    figures["warnings"] = step.warnings
    if chip.clock_hz:
        figures["estimated_step_seconds"] = step.seconds
        figures["estimated_mfu"] = flops.executed / (chip.peak_flops * num_devices * step.seconds)
        figures["seconds_by_part"] = {
            part: {kind: round(seconds, 6) for kind, seconds in kinds.items()}
            for part, kinds in step.table().items()
        }
    return figures, step


def without_cudnn(config, *, platform: str):
    """The configuration with the attention of XLA where a run's own choice may be cuDNN.

    cuDNN is asked for its version when a step is traced, and without a GPU it does not answer. What
    is no choice for a GPU is left as it is, to be refused as a run would.
    """
    if platform not in ("gpu", "cuda") or config.attention not in ("auto", "cudnn"):
        return config
    if config.attention == "cudnn":
        raise ConfigError(
            "attention=cudnn cannot be compiled without a GPU; leave it at auto, which is xla here"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.attention = "xla"
    return config


def find_max_batch(
    config, topology: Topology, *, is_quick: bool = False, hlo_file: str | None = None
) -> tuple[dict, Estimate | None]:
    """The check of the largest batch that fits, found by doubling, then halving.

    Batches are whole groups for every batch shard and micro-batch. The search compiles quickly,
    which as a rule takes a little more memory: the next larger batch may just fit as well, and
    where what it found does not fit after all, the next smaller ones are tried.

    Args:
      config: its `global_batch_size` is of no account.
      topology: to compile for.
      is_quick, hlo_file: of the last check, see `check`.

    Returns:
      As `check`; of the smallest batch that was tried, where none fits.

    Raises:
      ConfigError: as `check`.
      CompilerError: likewise; it names the largest batch that was found to fit until then.
    """
    config = config.copy_and_resolve_references()
    unit = config.group_size * config.grad_accumulation_steps
    with config.unlocked():
        config.global_batch_size = unit * len(topology.devices)  # divides, whatever the mesh
    unit *= sharding.batch_shards(startup.build_mesh(config, topology.devices))
    most, least = 0, 1  # multiples of it: what fits, and what does not

    def attempt(multiple: int, **settings) -> tuple[dict, Estimate | None]:
        with config.unlocked():
            config.global_batch_size = multiple * unit
        try:
            return check(config, topology, **settings)
        except CompilerError as error:
            found = f"global_batch_size={most * unit}" if most else "none"
            raise CompilerError(
                f"global_batch_size={multiple * unit}: {error}; the largest that was found to fit "
                f"until then, in a quick compile: {found}"
            ) from error

    def search(multiple: int) -> dict:
        figures, _ = attempt(multiple, is_quick=True)
        words = "fits" if figures["fits"] else "does not fit"
        print(f"global_batch_size={multiple * unit} {words}", flush=True)
        return figures

    while (figures := search(least))["fits"]:
        most, least = least, 2 * least
    while most and least - most > 1:
        middle = (most + least) // 2
        most, least = (middle, least) if search(middle)["fits"] else (most, middle)
    step = None
    while most:
        figures, step = attempt(most, is_quick=is_quick, hlo_file=hlo_file)
        if figures["fits"]:
            break
        print(f"global_batch_size={most * unit} does not fit when compiled in full", flush=True)
        most -= 1
    return figures, step


if __name__ == "__main__":
    sys.exit(main())
