"""What is read of the TPU compiler's texts; nothing is compiled, and its package is not needed."""

import pathlib
import re
import subprocess
import types

import pytest

from benchmarks import tpu_schedule
from dinov2_jax.config import REPOSITORY

TOPOLOGY = types.SimpleNamespace(chip=types.SimpleNamespace(clock_hz=1e9))
PROGRAM = """
  %fusion.1 = f32[8]{0} fusion(%x), backend_config={"estimated_cycles":"1500000","flag":"7"}
  %copy = f32[8]{0} copy(%fusion.1), backend_config={"estimated_cycles":"500000"}
  %kernel = f32[8]{0} custom-call(%copy), custom_call_target="tpu_custom_call"
"""
SIZES = dict(images=32, tokens=257, width=1024, rows=2450, k=65_536)


def test_cycles_of_fusions_and_copies_are_summed():
    compiled = types.SimpleNamespace(as_text=lambda: PROGRAM)
    assert tpu_schedule.visible_ms(compiled, TOPOLOGY) == 2.0


@pytest.mark.parametrize(
    ("what", "bundles", "expected"),
    [
        # 5 tiles of 512 rows, or 3 of 1,024, by 128 tiles of prototypes.
        (
            "prototypes",
            {"prototypes_sum_rows": 1000, "prototypes_max": 2000},
            {"prototypes_sum_rows": (1000, 640, 0.64), "prototypes_max": (2000, 384, 0.77)},
        ),
        # A block of tokens an image: of those kept, 19 of 32, and of all.
        (
            "drop_path",
            {"drop_path_fork": 3000, "drop_path_join": 5000},
            {"drop_path_fork": (3000, 19, 0.06), "drop_path_join": (5000, 32, 0.16)},
        ),
    ],
)
def test_bundles_count_once_a_grid_step(monkeypatch, capsys, what, bundles, expected):
    def run(command, *, env, **_):
        """In place of the process that compiles: what it leaves in the folder it is told."""
        assert command[-1] == "--no_kernels"
        (folder,) = re.findall(r"--xla_jf_dump_to=(\S+)", env["LIBTPU_INIT_ARGS"])
        for name, number in [*bundles.items(), ("fusion", 7)]:
            for module in (1, 2):  # the same kernel twice, which counts once
                file = f"{module}-{name}.{module}-79-schedule-analysis_final_bundles.txt"
                text = f"header\n  total scheduled bundles:   {number}\nempty bundles: 5\n"
                pathlib.Path(folder, file).write_text(text)

    monkeypatch.setattr(subprocess, "run", run)
    tpu_schedule.kernels(types.SimpleNamespace(what=what, **SIZES), TOPOLOGY)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(
        f"{name}: {number} bundles x {steps} grid steps = {ms:.2f} ms"
        for name, (number, steps, ms) in expected.items()
    )


def test_kernels_with_grids_of_their_own_are_called_so_in_the_package():
    sources = [path.read_text() for path in (REPOSITORY / "dinov2_jax").rglob("*_pallas.py")]
    names = re.findall(r'name=f?"(\w+(?:\{\w+\})?)"', "\n".join(sources))
    patterns = [re.sub(r"\{\w+\}", r"\\w+", name) for name in names]
    for kernel in tpu_schedule.WIDE_KERNELS:
        assert any(re.fullmatch(pattern, kernel) for pattern in patterns), kernel
