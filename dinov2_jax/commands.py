"""How commands end: with errors of one line, and exit codes."""

import sys
from collections.abc import Callable

from dinov2_jax import alarm
from dinov2_jax.distributed import HostError
from dinov2_jax.workdir import is_disk_full

# The first is what Python ends with.
UNEXPECTED, DISK_FULL, WRONG_INPUT, INTERRUPTED = 1, 1, 2, 130


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


def end_all(error: Exception, *, disk_full: str) -> None:
    """Of several processes, ends all for an error that nobody expects; a single one just returns.

    Args:
      error: says all of itself.
      disk_full: is said in its place where it comes of that.
    """
    if is_disk_full(error):
        alarm.ring(disk_full, DISK_FULL)
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
