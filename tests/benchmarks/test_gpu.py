"""The GPU benchmark's shares of the peak: of boards whose peak is known."""

import pytest

from benchmarks.gpu import Figures, mfu_note, peak_flops

FIGURES = dict(step_secs=0.1, images_per_sec=640.0, memory_mb=1000.0)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H200"])
def test_known_boards_need_no_note(kind):
    assert peak_flops(kind) > 0 and mfu_note(kind) is None


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "cpu"])
def test_another_board_of_a_known_name_has_no_mfu_and_a_line_says_why(kind):
    assert peak_flops(kind) is None
    assert mfu_note(kind).startswith(f"no MFU: the peak of {kind} is not known")


def test_a_row_without_a_peak_leaves_the_mfu_out():
    assert "MFU" not in str(Figures(model_mfu=None, executed_mfu=None, **FIGURES))
    assert ", MFU 40.0%, executed 30.0%, " in str(
        Figures(model_mfu=0.4, executed_mfu=0.3, **FIGURES)
    )
