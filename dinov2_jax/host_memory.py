"""What a training run on one CPU does with the memory of its steps: keeps it for the next one.

A step's arrays lie in one block of hundreds of megabytes. By itself glibc takes it from the system
page by page in every step, and gives it back: a tenth of a step's time. Kept, it must be asked for
by the thread that owns the heap: the main thread computes, not one of JAX's own, so the next batch
is copied after the step and not meanwhile.
"""

import ctypes
import os
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # processes of other libraries, which are measured, need no JAX
    from jax.sharding import Mesh

# Parameters of `mallopt`, malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# Whoever sets one of these has chosen, or starts several processes.
VARIABLES = (
    "GLIBC_TUNABLES",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH",
    "JAX_NUM_PROCESSES",
    "LD_PRELOAD",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
)

_is_jax_told = False  # JAX does not say what it was told
_is_kept = False


def compute_on_this_thread() -> None:
    """Lets JAX compute on the thread that asks for it, on CPUs. Before any other use of jax."""
    global _is_jax_told
    if not is_left_alone():
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _is_jax_told = True


def keep_freed_memory(mesh: "Mesh") -> bool:
    """From now on what this process frees stays its own; says whether it is so.

    Not unless `compute_on_this_thread` came first, nor on accelerators or on several devices, each
    of which has a thread; nor where it `is_left_alone`.
    """
    is_one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return _is_jax_told and is_one_cpu and keep_all()


def keep_all() -> bool:
    """As `keep_freed_memory`, of a process that does not use JAX."""
    global _is_kept
    if not is_left_alone():
        library = ctypes.CDLL(None)
        _is_kept = bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))
    return _is_kept


def give_back() -> None:
    """Returns free pages to the system, if they are kept: after what needs more than a step."""
    if _is_kept:
        ctypes.CDLL(None).malloc_trim(0)


def is_left_alone() -> bool:
    """Whether the C library is not glibc, or its user set `VARIABLES` (empty, too) or devices."""
    is_set = any(name in os.environ for name in VARIABLES)
    has_devices = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return is_set or has_devices or platform.libc_ver()[0] != "glibc"
