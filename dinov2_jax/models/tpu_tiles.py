"""Sizes that the Pallas kernels for TPU have in common, those of `losses` too."""

LANES = 128  # of a vector register; the width of what a kernel takes at a time
MIB = 2**20


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is not below x."""
    return -(-x // multiple) * multiple
