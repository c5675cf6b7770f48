"""The clock, and features that are not finite."""

import jax
import numpy as np
import pytest

from dinov2_jax.data.sources import open_source
from dinov2_jax.features import extract, fill
from dinov2_jax.features.fill import Clock
from dinov2_jax.model import Model


def test_the_clock_starts_after_the_first_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(fill.time, "perf_counter", lambda: now[0])

    def items():
        for i in range(3):
            now[0] += 1.0  # each takes a second to come
            yield i

    clock = Clock()
    waiting = clock.waiting(items())
    next(waiting)
    now[0] += 50.0  # the compiler
    clock.count(10)
    assert clock.rates() == (pytest.approx(10 / 51), pytest.approx(1 / 51))
    assert list(waiting) == [1, 2]
    now[0] += 2.0
    clock.count(30)
    assert clock.images == 40
    assert clock.rates() == (30 / 4, 2 / 4)
    assert str(clock) == "7.5 images/s, 50% of the time waiting for data"


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        ("float32", np.nan, "the model's weights are not sound"),
        ("float16", 1e6, "float16 ends at 65504: take bfloat16 or float32"),
    ],
)
def test_features_that_are_not_finite_are_named(model, photos, tmp_path, dtype, size, message):
    params = jax.tree.map(np.array, model.params)
    params["norm"]["bias"][5] = size
    source = open_source(str(photos / "class_0"))
    arguments = dict(what="cls,layers=1", norm=False, dtype=dtype, quiet=True)
    with pytest.raises(ValueError, match=rf"cls of .*00.jpg must be finite; {message}"):
        extract(Model(model.spec, params), source, tmp_path / "out", **arguments)
    assert not list((tmp_path / "out").glob("*shard*"))
