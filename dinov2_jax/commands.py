"""How commands end: with errors of one line, and exit codes."""

import os
import re
import sys
from collections.abc import Callable

import jax

from dinov2_jax import alarm
from dinov2_jax.cost.report import LESS_MEMORY
from dinov2_jax.distributed import HostError
from dinov2_jax.workdir import is_disk_full

# The first is what Python ends with.
UNEXPECTED, DISK_FULL, WRONG_INPUT, INTERRUPTED = 1, 1, 2, 130
NO_SPACE = (
    "no space left for --workdir={}; free some and run the same command again: what was saved is "
    "whole, and the run goes on from its last checkpoint"
)
NO_MEMORY = (
    "the memory of a device does not suffice ({}); "
    + LESS_MEMORY
    + "; docs/pods.md says how to check what fits before the devices are there"
)
# XLA's words; those of the coordinator's client for its messages are others.
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED: .*(out of memory|allocat|hbm)", re.I | re.S)


def run_command(action: Callable[[], int]) -> int:
    """Runs a command that goes on where it was; what is wrong with its input is one line on stderr.

    Of several processes, one that fails alone ends the others too.

    Returns:
      The exit code: the action's own, `DISK_FULL`, `WRONG_INPUT`, or after Ctrl-C `INTERRUPTED`.
    """
    try:
        return action()
    except KeyboardInterrupt:
        alarm.ring("interrupted", INTERRUPTED)
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if is_disk_full(error):
            return fail(f"{error}; free space, and the same command goes on", DISK_FULL)
        if isinstance(error, (ValueError, OSError, ModuleNotFoundError, HostError)):
            return fail(error, WRONG_INPUT)
        alarm.ring(error, UNEXPECTED, has_traceback=True)
        raise


def known_end(error: Exception, *, workdir: os.PathLike) -> tuple[str, int] | None:
    """What a training run ends with where a resource is used up, anywhere in it.

    Returns:
      A line and the exit code: `WRONG_INPUT` for want of the devices' memory, of which the same
      command would want as much again. None: the error is another.
    """
    if is_disk_full(error):
        return NO_SPACE.format(workdir), DISK_FULL
    if isinstance(error, jax.errors.JaxRuntimeError) and _NO_MEMORY.search(str(error)):
        return NO_MEMORY.format(" ".join(str(error).split())[:200]), WRONG_INPUT
    return None


def end_all(error: Exception, *, workdir: os.PathLike) -> None:
    """Of several processes that train, ends all for an error; a single one just returns.

    Args:
      error: says all of itself, unless its reason is known.
      workdir: of the run.
    """
    if known := known_end(error, workdir=workdir):
        alarm.ring(*known)
    alarm.ring(error, UNEXPECTED, has_traceback=True)


def fail(error: Exception | str, code: int) -> int:
    """Says in one line on stderr what was wrong; of several processes, ends all. Returns the code.

    Args:
      error: what was wrong.
      code: exit code.
    """
    alarm.ring(error, code)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code
