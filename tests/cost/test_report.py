"""What the compile check prints; with a compiler's own figures: tests/test_compile.py."""

from dinov2_jax.cost import report

FIGURES = {
    "topology": "v5e:2x2",
    "slices": 2,
    "mesh": {"data": 8, "fsdp": 1, "model": 1},
    "remat": "branches",
    "backward_kernels": None,
    "attention": "pallas",
    "heads": "by kernels",
    "dtype": "bfloat16",
    "fits": True,
    "global_batch_size": 32,
    "group_size": 4,
    "devices": 8,
    "compile_seconds": 41.2,
    "hbm_peak_bytes": 3 * 2**30,
    "hbm_limit_bytes": 4 * 2**30,
    "hbm_bytes": {"arguments": 2**30, "temporaries": 2**31},
    "model_flops": 1.5e12,
    "executed_flops": 1e12,
}


def test_a_step_that_fits(capsys):
    report.print_figures(FIGURES)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("v5e:2x2 x 2 slices: 8 devices, mesh data 8 x fsdp 1 x model 1; batch")
    assert "backward kernels" not in first and first.endswith("compiled in 41 s")
    assert second == "fits: 3.00 GiB of 4.00 GiB HBM (arguments 1.00 GiB, temporaries 2.00 GiB)"
    assert third == "FLOPs a step: model 1.5e+12, executed 1e+12"


def test_a_step_that_does_not_fit(capsys):
    report.print_figures(FIGURES | {"fits": False, "hbm_peak_bytes": 5 * 2**30, "hbm_bytes": {}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "does not fit: 5.00 GiB of 4.00 GiB HBM; 1.00 GiB too much"
    assert lines[2].startswith("what lowers it: mesh.fsdp")
