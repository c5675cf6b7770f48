"""Fills the table of docs/pods.md: `python -m benchmarks.compile_table`. No accelerator needed.

Every cell is a model, its batch and a slice, compiled by `dinov2_jax.compile` with one or more
candidates of mesh and rematerialisation. What is done lies in docs/compile/cells.jsonl and is not
done again; the table shows the candidate of the smallest estimated time. Minutes a candidate on
two CPU cores, so: stop it at any time, and run it again.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / "docs" / "compile" / "cells.jsonl"
PAGE = ROOT / "docs" / "pods.md"
MARKS = "<!-- table of compiled cells: made by benchmarks/compile_table.py -->", "<!-- end -->"
# Paper, Tables 16-17: 2048 images for S and B, 3072 for L and g.
BATCHES = {"s": 2048, "b": 2048, "l": 3072, "g": 3072}
GROUPS = {"s": 32, "b": 32, "l": 32, "g": 12}
CONFIGS = {"s": "vits14", "b": "vitb14", "l": "vitl14", "g": "vitg14"}
CELLS = {
    "l": "v5e:16x16 v6e:16x16 v5e:8x16 v6e:8x8 v5p:4x4x4 v4:4x4x8 tpu7x:4x4x4",
    "g": "v5e:16x16 v6e:16x16 v5e:16x16*2 v5p:4x4x8 v4:4x8x8 tpu7x:4x4x4",
    "s": "v5e:8x8 v6e:8x8 v5p:2x4x4 v4:4x4x4",
    "b": "v5e:8x8 v6e:8x8 v5p:2x4x4 tpu7x:2x2x4",
    "g518": "v6e:16x16 v5p:4x8x8 v4:8x8x8 tpu7x:4x4x8",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of the table: `model` is s, b, l, g or g518; `slices` of the topology."""

    model: str
    topology: str
    slices: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.topology}" + (f" x {self.slices}" if self.slices > 1 else "")

    @property
    def devices(self) -> int:
        chip, shape = self.topology.split(":")
        chips = math.prod(int(side) for side in shape.split("x")) * self.slices
        return chips * (2 if chip == "tpu7x" else 1)

    def candidates(self) -> list[dict[str, str]]:
        """Overrides to try, the most promising first."""
        letter = self.model[0]
        share = BATCHES[letter] // self.devices
        group = max(size for size in range(1, GROUPS[letter] + 1) if share % size == 0)
        common = {"global_batch_size": BATCHES[letter], "group_size": group}
        common["mesh.fsdp"] = {"s": 8, "b": 8, "l": 16, "g": 16}[letter]
        if self.model == "g518":
            common["crops.global_crop_size_px"] = 518
        other = {"s": 1, "b": 1, "l": 64, "g": 64}[letter]
        return [
            {**common, "remat": "branches"},
            {**common, "remat": "dots"},
            {**common, "mesh.fsdp": min(other, self.devices), "remat": "branches"},
        ]


def cells() -> list[Cell]:
    """Every cell of the table, in its order."""
    found = []
    for model, topologies in CELLS.items():
        for text in topologies.split():
            topology, _, slices = text.partition("*")
            found.append(Cell(model, topology, int(slices or 1)))
    return found


def read_cache() -> dict[tuple[str, str], dict]:
    """Figures by the cell's name and the candidate's text, the last compiled of each, last."""
    found = {}
    for text in CACHE.read_text().splitlines() if CACHE.exists() else ():
        line = json.loads(text)
        key = line["cell"], line["overrides"]
        found.pop(key, None)
        found[key] = line
    return found


def revision() -> str:
    """Of this source tree: figures of different ones are not to be compared."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def compile_candidate(cell: Cell, overrides: dict, *, limit_secs: float) -> dict | None:
    """The figures of `dinov2_jax.compile`, or None if it took too long or failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "figures.json"
        command = [
            sys.executable,
            "-m",
            "dinov2_jax.compile",
            f"--config=configs/{CONFIGS[cell.model[0]]}.py",
            f"--topology={cell.topology}",
            f"--slices={cell.slices}",
            f"--json={file}",
            *(f"--config.{key}={value}" for key, value in overrides.items()),
        ]
        try:
            subprocess.run(command, cwd=ROOT, timeout=limit_secs, preexec_fn=lambda: os.nice(10))
        except subprocess.TimeoutExpired:
            print(f"{cell.name}: more than {limit_secs:.0f} s", flush=True)
            return None
        return json.loads(file.read_text()) if file.exists() else None


def table(cache: dict[tuple[str, str], dict]) -> str:
    """The table in Markdown: of each cell the candidate that did best, and the times of the others.

    What is of another revision than the last one shown is marked: other code, other figures.
    """
    rows = [
        "| cell | images a device | mesh d x f x m | remat | HBM, GiB | executed PFLOP | "
        "step, ms | MFU | most of the time | others, ms |",
        "|---" * 10 + "|",
    ]
    tried = {
        cell: sorted(
            (line for (name, _), line in cache.items() if name == cell.name),
            key=lambda x: (x["estimated_step_seconds"] or math.inf, x["hbm_peak_bytes"]),
        )
        for cell in cells()
    }
    shown = [lines[0] for lines in tried.values() if lines]
    newest = [line["revision"] for line in cache.values() if line in shown][-1:]
    for cell, lines in tried.items():
        if lines:
            rows.append(_row(cell, lines, newest))
        else:
            rows.append(f"| {cell.name} | not compiled yet |" + " |" * 8)
    return "\n".join(rows)


def _row(cell: Cell, tried: list[dict], newest: list[str]) -> str:
    best, *others = tried
    memory = f"{best['hbm_peak_bytes'] / 2**30:.1f} of {best['hbm_limit_bytes'] / 2**30:.1f}"
    seconds = best["estimated_step_seconds"]
    if seconds:
        parts = {part: sum(kinds.values()) for part, kinds in best["seconds_by_part"].items()}
        longest = sorted(parts, key=parts.get, reverse=True)[:3]
        words = ", ".join(f"{part} {parts[part] / seconds:.0%}" for part in longest)
        times = f"{seconds * 1e3:.0f} | {best['estimated_mfu']:.1%} | {words}"
    else:
        times = "does not fit | | "
    mesh = " x ".join(str(size) for size in best["mesh"].values())
    images = best["global_batch_size"] // best["devices"]
    flops = f"{best['executed_flops'] / 1e15:.1f}"
    mark, *marks = ("" if line["revision"] in newest else " †" for line in tried)
    name = cell.name + mark
    rest = ", ".join(_difference(x, best) + mark for x, mark in zip(others, marks, strict=True))
    return (
        f"| {name} | {images} | {mesh} | {best['remat']} | {memory} | {flops} | {times} | {rest} |"
    )


def _difference(line: dict, best: dict) -> str:
    """How another candidate differs from the best, and its time: "dots 213"."""
    words = [line["remat"]] if line["remat"] != best["remat"] else []
    if line["mesh"] != best["mesh"]:
        words.append(f"fsdp={line['mesh']['fsdp']}")
    seconds = line["estimated_step_seconds"]
    return " ".join([*words, f"{seconds * 1e3:.0f}" if seconds else "does not fit"])


def write_table() -> None:
    """Puts the table between the marks of docs/pods.md."""
    before, rest = PAGE.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(read_cache())}\n{MARKS[1]}{after}")


def main() -> None:
    """Compiles what is missing, in rounds: the first candidate of every cell, then the second."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression of cells' names")
    parser.add_argument("--rounds", type=int, help="candidates of each cell; all of them otherwise")
    parser.add_argument("--limit_secs", type=float, default=3600, help="of one candidate")
    parser.add_argument("--table", action="store_true", help="write the table; compile nothing")
    flags = parser.parse_args()
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    most = max(len(cell.candidates()) for cell in cells())
    rounds = most if flags.rounds is None else flags.rounds
    for number in range(0 if flags.table else rounds):
        for cell in cells():
            candidates = cell.candidates()
            if number >= len(candidates) or not re.search(flags.only, cell.name):
                continue
            text = " ".join(f"{key}={value}" for key, value in candidates[number].items())
            if (cell.name, text) in read_cache():
                continue
            print(f"{cell.name}: {text}", flush=True)
            figures = compile_candidate(cell, candidates[number], limit_secs=flags.limit_secs)
            if figures is not None:
                line = {"cell": cell.name, "overrides": text, "revision": revision()} | figures
                with CACHE.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                write_table()
    write_table()


if __name__ == "__main__":
    main()
