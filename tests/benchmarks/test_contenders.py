"""Ours among the contenders is the step of a run, and leaves what the others start from."""

import json

import numpy as np

from benchmarks.contenders import start_ours
from tests.small_run import SHRINK


def test_ours_trains_and_leaves_what_it_started_from(cache, tmp_path):
    step = start_ours("quickstart", SHRINK, str(tmp_path))
    losses = [step()["total_loss"] for _ in range(3)]
    assert np.isfinite(losses).all() and len(set(losses)) == 3
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["sizes"] == {"embed_dim": 16, "depth": 2, "num_heads": 2}
    with np.load(tmp_path / "batch.npz") as batch:
        assert batch["global_crops"].shape == (4, 2, 16, 16, 3)
    with np.load(tmp_path / "start.npz") as start:
        assert any(name.startswith("backbone.") for name in start)
