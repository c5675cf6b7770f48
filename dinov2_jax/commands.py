"""What commands share: numbers as flags, errors of one line, and exit codes."""

import argparse
import math
import sys
from collections.abc import Callable

from dinov2_jax.distributed import HostError
from dinov2_jax.workdir import is_disk_full

DISK_FULL, WRONG_INPUT, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Raises ValueError, of one line, where argparse would print its usage and exit."""

    def error(self, message):
        raise ValueError(f"{message}; --help shows the options")


def positive(text: str) -> int:
    """A flag's type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """A flag's type: a number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return float(text)


def count(text: str) -> int:
    """A flag's type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 0")
    return int(text)


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
