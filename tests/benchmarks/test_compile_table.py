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
        fsdp, remat = overrides["mesh.fsdp"], overrides["remat"]
        tried.append((cell.name, fsdp, remat))
        if len(tried) == 3:
            raise KeyboardInterrupt
        secs = {"branches": 2.0, "dots": 1.0}[remat] + fsdp / 10
        figures = dict(hbm_peak_bytes=2**30, hbm_limit_bytes=2**34, executed_flops=1e15)
        figures |= dict(estimated_step_seconds=secs, estimated_mfu=0.5, devices=64)
        figures |= dict(seconds_by_part={"mlp": {"products": secs}})
        figures |= dict(mesh={"data": 64 // fsdp, "fsdp": fsdp})
        return figures | dict(remat=remat, global_batch_size=2048)

    page = tmp_path / "pods.md"
    page.write_text("\n".join(["before", *compile_table.MARKS, "after"]))
    revisions = iter("aabbcc")
    monkeypatch.setattr(compile_table, "CACHE", tmp_path / "compile" / "cells.jsonl")
    monkeypatch.setattr(compile_table, "PAGE", page)
    monkeypatch.setattr(compile_table, "revision", lambda: next(revisions))
    monkeypatch.setattr(compile_table, "compile_candidate", compile_candidate)
    monkeypatch.setattr("sys.argv", ["compile_table", "--only", "^s v[56]e"])
    with pytest.raises(KeyboardInterrupt):
        compile_table.main()
    first, second = "s v5e:8x8", "s v6e:8x8"
    done, left = [(name, 8, "branches") for name in (first, second)], (second, 8, "dots")
    assert tried == [*done, (first, 8, "dots")]
    compile_table.main()
    meshes = [(name, 1, "branches") for name in (first, second)]
    assert tried[3:] == [(first, 8, "dots"), left, *meshes]
    rows = [json.loads(text) for text in compile_table.CACHE.read_text().splitlines()]
    found = [(row["cell"], row["mesh"]["fsdp"], row["remat"]) for row in rows]
    assert found == [*done, *tried[3:]]
    # The fastest is in the table, with what the others took.
    text = page.read_text()
    assert f"| {first} | 32 | 8 x 8 | dots | 1.0 of 16.0 | 1.0 | 1800 | 50.0% |" in text
    assert text.count("| branches fsdp=1 2100 †, branches 2800 † |") == 2
    assert text.startswith("before") and text.endswith("after")


def test_cells_of_other_code_are_marked():
    line = dict(hbm_peak_bytes=1, hbm_limit_bytes=1, executed_flops=1, estimated_mfu=0.5)
    line |= dict(seconds_by_part={}, mesh={"fsdp": 1}, devices=1, global_batch_size=1)
    names = [cell.name for cell in cells()]
    cache = {
        (name, remat): line | dict(cell=name, remat=remat, revision=new, estimated_step_seconds=at)
        for name, remat, new, at in (
            (names[0], "branches", "old", 1.0),
            (names[1], "branches", "new", 1.0),
            (names[2], "branches", "new", 1.0),
            (names[2], "dots", "newest", 2.0),  # not shown: it was slower
            (names[3], "dots", "new", None),
        )
    }
    found = compile_table.table(cache).splitlines()[2:]
    assert [row.startswith(f"| {name} † |") for row, name in zip(found, names, strict=True)] == [
        True,
        *[False] * 24,
    ]
    assert "dots 2000 † |" in found[2] and "does not fit" in found[3]
    assert found[4].startswith(f"| {names[4]} | not compiled yet |")
