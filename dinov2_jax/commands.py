"""How commands end: with errors of one line, and exit codes."""

import sys
from collections.abc import Callable

from dinov2_jax.distributed import HostError
from dinov2_jax.workdir import is_disk_full

DISK_FULL, WRONG_INPUT, INTERRUPTED = 1, 2, 130


def run_command(action: Callable[[], int]) -> int:
    """Runs a command that goes on where it was; what is wrong with its input is one line on stderr.

    Returns:
      The exit code: the action's own, `DISK_FULL`, `WRONG_INPUT`, or after Ctrl-C `INTERRUPTED`.
    """
    try:
        return action()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError, HostError) as error:
        text = " ".join(str(error).split())
        if is_disk_full(error):
            print(f"error: {text}; free space, and the same command goes on", file=sys.stderr)
            return DISK_FULL
        print(f"error: {text}", file=sys.stderr)
        return WRONG_INPUT
