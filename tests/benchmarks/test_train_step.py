"""The step's benchmark: the same losses by all, a line for each, and for ours changed."""

import re

import pytest

from benchmarks import train_step
from tests.parity import require
from tests.small_run import SHRINK

# Without drop path: else the contenders draw other images, and their losses differ.
TINY = SHRINK | train_step.CHECKED | {"model.drop_path_rate": 0.0}


@pytest.mark.parity
def test_contenders_agree_and_a_variant_is_ours_changed(cache, monkeypatch, capfd):
    require("dinov2")
    monkeypatch.setattr(train_step, "limit_threads", lambda _: None)  # of this process, for good
    monkeypatch.setitem(train_step.CASES, "tiny", ("quickstart", TINY))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=0")
    flags = "--contenders reference reference+sdpa --variants remat=none --rounds 2"
    monkeypatch.setattr("sys.argv", f"train_step --cases tiny {flags}".split())
    train_step.main()
    out = capfd.readouterr().out
    assert out.splitlines()[0].endswith("GLIBC_TUNABLES='glibc.malloc.perturb=0'")
    found = re.findall(r"tiny \| ours and (\S+) differ by (\S+) in the first losses", out)
    errors = {name: float(error) for name, error in found}
    assert list(errors) == ["reference", "reference+sdpa", "remat=none"]
    assert 0 < errors["reference"] < 1e-5 and 0 < errors["reference+sdpa"] < 1e-5
    names = re.findall(r"^tiny \| (\S+) +\| +[\d.]+ s, +[\d.]+ CPU s, +\d+ MB; ours is", out, re.M)
    assert names == ["ours", "reference", "reference+sdpa", "remat=none"]
    assert "ours is 1.00 times as fast, 1.00 by CPU time, in 1.00 times the memory" in out
