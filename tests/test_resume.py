"""A checkpoint goes on with fewer devices and another mesh: the same data, the same numbers.

With other numbers of processes: test_multihost.py; bit for bit on the same devices: test_train.py.
"""

import os
import signal

import numpy as np
import pytest

from dinov2_jax.feed import Feed
from tests.small_run import after_line, repeatable, run

# LayerScale 1: at 1e-5 all class tokens nearly coincide, and KoLeo is ill-conditioned.
SETTINGS = dict(
    global_batch_size=16,
    group_size=2,
    model__layer_scale_init=1.0,
    mesh__min_size_to_shard_mb=0,
)
MESHES = (
    dict(mesh__data=2, mesh__fsdp=2, mesh__model=2),
    dict(mesh__data=1, mesh__fsdp=2, mesh__model=1),
    dict(mesh__data=1, mesh__fsdp=1, mesh__model=1),
)


def test_eight_devices_then_two_then_one_are_one_run(cache, tmp_path, monkeypatch, capsys):
    fed, take = [], Feed.take

    def noted(self):
        batch = take(self)
        fed.append(batch.host.index)
        return batch

    monkeypatch.setattr(Feed, "take", noted)
    for mesh, stop_after in zip(MESHES, (4, 8, None), strict=True):
        with monkeypatch.context() as patch:
            if stop_after:
                stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
                after_line(patch, stop_after, stop)
            expected = 143 if stop_after else 0
            assert run(tmp_path / "a", **SETTINGS | mesh) == expected
    order = np.concatenate(fed)
    np.testing.assert_array_equal(order, np.arange(12 * SETTINGS["global_batch_size"]))
    text = capsys.readouterr().out
    for devices in (8, 2, 1):
        assert f"of {devices} x cpu" in text

    assert run(tmp_path / "b", **SETTINGS | MESHES[-1]) == 0
    ours, theirs = repeatable(tmp_path / "a"), repeatable(tmp_path / "b")
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6), a["step"]
