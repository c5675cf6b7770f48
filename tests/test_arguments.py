"""Flags: numbers in their range, and errors that are no exit."""

import argparse

import pytest

from dinov2_jax.arguments import Parser, count, positive, positive_number


def test_numbers():
    assert (positive("12"), count("0"), positive_number("0.5")) == (12, 0, 0.5)
    for kind, text in (
        *((positive, x) for x in ("0", "-1", "1.5", "x")),
        *((count, x) for x in ("-1", "1.5")),
        *((positive_number, x) for x in ("0", "-2", "inf", "nan")),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' must be"):
            kind(text)


def test_wrong_flags_are_errors_and_no_exit():
    with pytest.raises(ValueError, match=r"unrecognized arguments: --x; --help shows the options"):
        Parser().parse_args(["--x"])
