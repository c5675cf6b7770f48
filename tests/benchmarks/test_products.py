"""The products' benchmark: all contenders compute the same."""

import importlib.util

import numpy as np
import pytest

from benchmarks.products import CONTENDERS, FORMS, start


@pytest.mark.parametrize("form", FORMS)
def test_contenders_compute_the_same(form):
    names = [n for n in CONTENDERS if n != "pytorch" or importlib.util.find_spec("torch")]
    first, *others = (start(name, "fc1", form, rows=6)() for name in names)
    shape = {"forward": (6, 1536), "inputs": (6, 384), "weights": (384, 1536)}[form]
    assert first.shape == shape
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-4)
