"""The table of docs/pods.md: its cells can be compiled, and it says what was compiled."""

import json

import pytest

from benchmarks import compile_table
from benchmarks.compile_table import cells
from benchmarks.contenders import load
from dinov2_jax.config_rules import check_groups
from dinov2_jax.cost.chips import TPUS


def test_the_page_has_the_table_of_what_was_compiled():
    _, page = compile_table.PAGE.read_text().split(compile_table.MARKS[0])
    found = page.split(compile_table.MARKS[1])[0].strip()
    assert found == compile_table.table(compile_table.read_cache())


def test_the_cells_are_of_every_size_and_chip():
    assert len({cell.name for cell in cells()}) == len(cells()) == 25
    assert {cell.model for cell in cells()} == {"s", "b", "l", "g", "g518"}
    chips = [TPUS[cell.topology.partition(":")[0]] for cell in cells()]
    assert {chip.name for chip in chips} == set(TPUS)
    sizes = [
        cell.devices // chip.devices_per_chip for cell, chip in zip(cells(), chips, strict=True)
    ]
    assert (min(sizes), max(sizes)) == (16, 512)


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)
def test_every_candidate_is_a_configuration_for_its_devices(cell):
    for overrides in cell.candidates():
        config = load(compile_table.CONFIGS[cell.model[0]], overrides)
        check_groups(
            global_batch_size=config.global_batch_size,
            group_size=config.group_size,
            num_batch_shards=cell.devices,
        )
        assert cell.devices % config.mesh.fsdp == 0


def test_what_is_done_is_not_done_again(monkeypatch, tmp_path):
    """The first candidate of each cell, then the second; after a stop, what is left."""
    tried = []

    def compile_candidate(cell, overrides, *, limit_secs):
        tried.append((cell.name, overrides["remat"]))
        if len(tried) == 3:
            raise KeyboardInterrupt
        secs = {"branches": 2.0, "dots": 1.0}[overrides["remat"]]
        figures = dict(hbm_peak_bytes=2**30, hbm_limit_bytes=2**34, executed_flops=1e15)
        figures |= dict(estimated_step_seconds=secs, estimated_mfu=0.5, devices=64)
        figures |= dict(seconds_by_part={"mlp": {"products": secs}}, mesh={"data": 64, "fsdp": 1})
        return figures | dict(remat=overrides["remat"], global_batch_size=2048)

    page = tmp_path / "pods.md"
    page.write_text("\n".join(["before", *compile_table.MARKS, "after"]))
    monkeypatch.setattr(compile_table, "CACHE", tmp_path / "compile" / "cells.jsonl")
    monkeypatch.setattr(compile_table, "PAGE", page)
    monkeypatch.setattr(compile_table, "revision", lambda: "0000000")
    monkeypatch.setattr(compile_table, "compile_candidate", compile_candidate)
    monkeypatch.setattr("sys.argv", ["compile_table", "--only", "^s v[56]e"])
    with pytest.raises(KeyboardInterrupt):
        compile_table.main()
    first, second = "s v5e:8x8", "s v6e:8x8"
    done, left = [(name, "branches") for name in (first, second)], (second, "dots")
    assert tried == [*done, (first, "dots")]
    compile_table.main()
    assert tried[3:] == [(first, "dots"), left]
    rows = [json.loads(text) for text in compile_table.CACHE.read_text().splitlines()]
    assert [(row["cell"], row["remat"]) for row in rows] == [*done, *tried[3:]]
    # The faster of the two is in the table.
    text = page.read_text()
    assert f"| {first} | 32 | 64 x 1 | dots | 1.0 of 16.0 | 1.0 | 1000 | 50.0% |" in text
    assert text.startswith("before") and text.endswith("after")
