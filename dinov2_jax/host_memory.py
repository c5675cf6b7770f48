"""What a training run on a CPU does with the memory of its steps: keeps it for the next one.

A step's arrays lie in one block of hundreds of megabytes. By itself glibc takes it from the system
page by page in every step, and gives it back: a tenth of a step's time. Kept, it must be asked for
by the thread that owns the heap, so the main thread computes, not one of JAX's own.
"""

import ctypes
import os
import platform

import jax
from jax.sharding import Mesh

# Parameters of `mallopt`, malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# Whoever sets one of these has chosen.
VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD")


_IS_JAX_TOLD = False  # JAX does not say what it was told


def compute_on_this_thread() -> None:
    """Lets JAX compute on the thread that asks for it, on CPUs. Before any other use of jax."""
    global _IS_JAX_TOLD
    if not _is_left_alone():
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _IS_JAX_TOLD = True


def keep_freed_memory(mesh: Mesh) -> bool:
    """From now on what this process frees stays its own; says whether it is so.

    Not unless `compute_on_this_thread` came first, nor on accelerators or on several devices, each
    of which has a thread; nor where another C library than glibc is in use, or one of `VARIABLES`
    is set, be it empty.
    """
    is_one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return _IS_JAX_TOLD and is_one_cpu and keep_all()


def keep_all() -> bool:
    """As `keep_freed_memory`, of a process that does not use JAX."""
    if _is_left_alone():
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))


def give_back() -> None:
    """Returns free pages to the system: compiling needs more of them than many a step."""
    if not _is_left_alone():
        ctypes.CDLL(None).malloc_trim(0)


def _is_left_alone() -> bool:
    return platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in VARIABLES)
