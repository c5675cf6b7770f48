"""What the flags of commands share: their errors, and numbers."""

import argparse
import math


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
