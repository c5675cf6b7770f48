"""The prototype losses' benchmark: both ways compute the same, and both reports come out."""

import re

import jax
import numpy as np

from benchmarks import prototypes
from dinov2_jax.losses.head_modes import BlockHeads, DenseHeads


def run(monkeypatch, capsys, *arguments: str) -> list[str]:
    monkeypatch.setattr("sys.argv", ["prototypes", *arguments])
    prototypes.main()
    return capsys.readouterr().out.splitlines()


def test_both_ways_have_the_same_gradient():
    case = prototypes.Case(rows=12, k=64)
    inputs = case.inputs()
    dense, blocks = (case.compile(heads)(*inputs) for heads in (DenseHeads(), BlockHeads(16)))
    for ours, right in zip(jax.tree.leaves(blocks), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


def test_memory_is_that_of_the_compiled_gradient(monkeypatch, capsys):
    rows, k = 1200, 4096
    header, row = run(monkeypatch, capsys, "memory", "--rows", str(rows), "--k", str(k))
    assert header.split() == ["rows", "K", "gradient", "MB", "dense", "MB", "blocks", "MB"]
    found = [float(text) for text in row.split()]
    assert found[:2] == [rows, k]
    # Of the one layer's kernel and bias, and of directions and lengths.
    gradient = 4 * (prototypes.BOTTLENECK * (prototypes.WIDTH + 1 + k) + k)
    np.testing.assert_allclose(found[2], gradient / 1e6, atol=0.06)
    assert found[3] > 4 * rows * k / 1e6 and found[4] < found[3]


def test_times_are_of_every_way(monkeypatch, capsys):
    sizes = "--rows 8 --k 64 --block_sizes 0 16 --rounds 1".split()
    lines = run(monkeypatch, capsys, "time", *sizes)
    pattern = (
        r"rows +8  K +64  (\S+(?: \S+)?) +[\d.]+ ms \([\d.]+ at best\), ([\d.]+) times dense; "
        r"[\d.]+ times in CPU time"
    )
    ways, ratios = zip(*(re.fullmatch(pattern, line).groups() for line in lines), strict=True)
    assert ways == ("dense", "blocks auto", "blocks 16") and ratios[0] == "1.00"
