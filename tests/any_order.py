"""Kernels whose parallel steps come in another order, as on chips whose cores share them.

Interpreted as a whole TPU core, by jax's simulator: memory starts as NaN, and a block of a result
that is visited again after others is not what it was.
"""

from unittest import mock

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def assert_same_in_any_order(function, *args, kernels: set[str]) -> None:
    """Runs a function of arrays twice, the second time with its `kernels` out of order.

    Steps along dimensions that are declared "parallel" come at random. A kernel that adds up along
    one of them, or that starts a sum at its first step there, gives something else.
    """
    want = jax.jit(lambda *args: function(*args))(*args)
    # By this seed no dimension of 2 to 6 steps comes as it is, or with its first step first.
    simulator = pltpu.InterpretParams(random_seed=4, out_of_bounds_reads="uninitialized")
    plain, found = pl.pallas_call, set()

    def out_of_order(*args, **settings):
        found.add(settings["name"])
        return plain(*args, **(settings | {"interpret": simulator}))

    with mock.patch.object(pl, "pallas_call", out_of_order):
        got = jax.jit(lambda *args: function(*args))(*args)
    assert found == kernels  # none of them was traced before, and taken from there
    for left, right in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6 * np.abs(right).max())
