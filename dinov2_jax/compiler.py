"""How XLA compiles a run: presets of its flags, and the cache of what it compiled."""

import contextlib
import functools
import os
import platform as machine
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from dinov2_jax.hub import cache_folder

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"

# Options for `jax.jit`: of the step alone, unlike XLA_FLAGS. Those of MaxText and NVIDIA.
PRESETS: dict[str, dict[str, str | bool | int]] = {
    "": {},
    # Products by XLA's older library. Alone they are no faster than by the one that it takes of
    # itself, but whole steps were a little, where they were measured: docs/performance.md.
    "cpu_products": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    # Collectives run while the cores compute, fused with what needs or makes their data.
    "tpu_overlap": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
    },
    # Likewise, over turns of the scan, and in fewer and larger pieces.
    "gpu_overlap": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        "xla_gpu_all_gather_combine_threshold_bytes": 134_217_728,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 67_108_864,
        "xla_gpu_all_reduce_combine_threshold_bytes": 134_217_728,
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
}


def choose_preset(preset: str, *, platform: str) -> str:
    """The preset that "auto" is on a platform; any other name as it is.

    "cpu_products" on CPU if this release of XLA has its flag, which is experimental; elsewhere "".
    """
    if preset != "auto":
        return preset
    return "cpu_products" if platform == "cpu" and _is_known("cpu_products") else ""


def compiler_options(preset: str, *, platform: str) -> dict[str, str | bool | int]:
    """The flags of a preset, for devices of a platform such as "tpu".

    Raises:
      ValueError: an unknown preset, or one for other devices, whose flags would do nothing.
    """
    preset = choose_preset(preset, platform=platform)
    if preset not in PRESETS:
        names = ", ".join(repr(name) for name in ("auto", *PRESETS))
        raise ValueError(f"compiler_preset={preset!r} must be one of: {names}")
    wanted = {"cuda": "gpu"}.get(platform, platform)
    if preset and not preset.startswith(f"{wanted}_"):
        fitting = [name for name in PRESETS if name.startswith(f"{wanted}_")] or ["none"]
        raise ValueError(
            f"compiler_preset={preset!r} is not for {platform}; for it there is: "
            f"{', '.join(fitting)}"
        )
    return PRESETS[preset]


@functools.cache
def _is_known(preset: str) -> bool:
    """Whether XLA takes the flags of a preset: it refuses names and values that it has not."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=PRESETS[preset])
    except jax.errors.JaxRuntimeError:
        return False
    return True


def use_compilation_cache() -> None:
    """Keeps what is compiled, so that the same run starts faster the next time.

    In `$JAX_COMPILATION_CACHE_DIR` if that is set (empty: nothing is kept), else in `compiled/` and
    the machine's name beside the released weights, see `dinov2_jax.hub.cache_folder`: programs for
    one CPU may not run on another that shares the folder. It may be deleted at any time.
    """
    if CACHE_VARIABLE not in os.environ and jax.config.jax_compilation_cache_dir is None:
        folder = cache_folder() / "compiled" / machine.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compiles everything anew: what is compiled for absent devices cannot be read back."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # it looks at the setting but once
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
