"""Opens the compilers of accelerators that are not there.

In: a name such as "v5e:16x16" or "cuda:h100:1x8". Out: devices to compile for, and their figures.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from dinov2_jax.cost.chips import GPUS, TPUS, Chip

# What libtpu asks for where there is no TPU.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device to lock
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # of no effect here, but it complains without
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# Either will do: one of them comes with jax for GPUs.
CUDA_COMPILERS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


class TopologyError(ValueError):
    """A topology that cannot be compiled for; its text is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that need not exist.

    Attributes:
      name: as given; num_slices: of that shape, joined by the data centre's network.
      chip: of each.
      devices: of all slices, in jax's order.
    """

    name: str
    num_slices: int
    chip: Chip
    devices: Sequence[Any]


def open_topology(name: str, *, num_slices: int = 1) -> Topology:
    """The devices of a topology: "CHIP:SHAPE" of TPU chips, or "cuda:GPU:HOSTSxGPUS".

    Sets what libtpu needs in the environment, so call it before anything else loads libtpu.

    Raises:
      TopologyError: the name is unknown or badly formed, the shape does not exist, or the
        compiler is not installed.
    """
    is_gpu = name.startswith("cuda:")
    kind, _, shape = name.removeprefix("cuda:").partition(":")
    chips = {gpu.chip.name: gpu.chip for gpu in GPUS.values()} if is_gpu else TPUS
    known = ", ".join(chip.example for chip in (*TPUS.values(), GPUS["h100"].chip))
    chip = chips.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        others = f"; GPUs: {', '.join(GPUS)}" if is_gpu else ""
        raise TopologyError(f"--topology={name} must be CHIP:SHAPE, such as {known}{others}")
    if shape.count("x") + 1 != chip.axes:
        raise TopologyError(
            f"--topology={name}: the shape must have {chip.axes} axes, as {chip.example} has"
        )
    num_chips = math.prod(int(side) for side in shape.split("x"))
    if chip.slice_chips and num_chips > chip.slice_chips:
        raise TopologyError(
            f"--topology={name} has {num_chips} chips, but a slice of {kind} at most "
            f"{chip.slice_chips}; join several by --slices"
        )
    if num_slices < 1:
        raise TopologyError(f"--slices={num_slices} must be at least 1")
    modules = CUDA_COMPILERS if is_gpu else ("libtpu",)
    if not any(is_installed(module) for module in modules):
        extras = "'dinov2_jax[cuda12]' or 'dinov2_jax[cuda13]'" if is_gpu else "'dinov2_jax[tpu]'"
        raise TopologyError(
            f"--topology={name} needs a compiler that is not installed; pip install {extras}"
        )
    if is_gpu and num_slices > 1:
        raise TopologyError(f"--slices={num_slices} is for TPUs; give more hosts: cuda:{kind}:2x8")
    try:
        devices = _gpus(kind, shape) if is_gpu else _tpus(name, num_slices)
    except Exception as error:  # jax and libtpu raise different ones
        first_line = str(error).strip().split("\n")[0]
        raise TopologyError(
            f"--topology={name} is no slice that the compiler knows ({first_line}); "
            f"shapes that work: {known}"
        ) from error
    return Topology(name, num_slices, chip, devices)


def is_installed(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _tpus(name: str, num_slices: int) -> Sequence[Any]:
    for variable, value in NO_TPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # Without it a v4 chip is two devices of half its memory each.
    extra = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if num_slices > 1:
        extra["num_slices"] = num_slices
    return topologies.get_topology_desc(name, platform="tpu", **extra).devices


def _gpus(kind: str, shape: str) -> Sequence[Any]:
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda", target_config=GPUS[kind].target_config(), topology=f"1x{shape}"
    ).devices
