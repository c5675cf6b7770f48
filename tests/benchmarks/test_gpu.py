"""The GPU's figures: every row is a configuration, and rows come out on a machine without one."""

import gc
import re
import types
import weakref

import pytest

from benchmarks import gpu
from benchmarks.contenders import load
from tests.data.conftest import encode, make_image
from tests.small_run import SHRINK

ALIVE = weakref.WeakSet()  # of `FakeStep`
FIGURES = dict(step_secs=0.1, images_per_sec=640.0, memory_mb=1000.0)


@pytest.fixture
def run(cache, monkeypatch, capsys, tmp_path):
    """The command with one step a row on four small images; returns the lines it prints."""
    # Enough prototypes for a state of some MB.
    monkeypatch.setattr(gpu, "TINY", SHRINK | {"dino.num_prototypes": 16_384})
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encode(make_image(i)))

    def main(*arguments: str) -> list[str]:
        sizes = ["--tiny", "--models", "S", "--steps", "1", "--workers", "0"]
        command = ["gpu", *sizes, "--data", str(tmp_path), *arguments]
        monkeypatch.setattr("sys.argv", command)
        gpu.main()
        return capsys.readouterr().out.splitlines()

    return main


@pytest.mark.parametrize("variant", gpu.VARIANTS)
@pytest.mark.parametrize("model", gpu.MODELS)
def test_every_row_is_a_configuration(model, variant):
    config_name, batch_size = gpu.MODELS[model]
    overrides = {"global_batch_size": batch_size, "group_size": batch_size} | gpu.PROTOTYPES
    config = load(config_name, overrides | gpu.VARIANTS[variant])
    assert config.dino.num_prototypes == config.ibot.num_prototypes == 65_536
    assert all(str(config[key]) == value for key, value in gpu.VARIANTS[variant].items())


def test_a_row_has_its_figures_and_what_is_not_here_says_so(run):
    header, note, row, wait, missing = run("--variants", "default", "attention=cudnn")
    assert header.endswith("cpu, 1 steps a row")
    pattern = r"S default +([\d.]+) ms, +([\d.]+) images/s, +(\d+) MB"
    assert note == gpu.mfu_note("cpu")
    ms, images_per_sec, memory_mb = map(float, re.fullmatch(pattern, row).groups())
    assert ms * images_per_sec / 1e3 == pytest.approx(4, rel=0.1)  # the batch, but for rounding
    assert memory_mb > 0
    (share,) = re.fullmatch(r"S waits for data ([\d.]+)% of the time", wait).groups()
    assert 0 <= float(share) <= 100
    assert re.fullmatch(r"S attention=cudnn +not here: .*cudnn.*", missing)


class FakeStep:
    """As `Step`; with the attention of XLA it fails when it is half made."""

    def __init__(self, config):
        assert not ALIVE, "the state of the row before is still held"
        ALIVE.add(self)
        if config.attention == "xla":
            # As jax does: the error, its traceback and what that holds are a cycle.
            self.error = RuntimeError("out of memory")
            raise self.error

    def figures(self, num_steps):
        return gpu.Figures(model_mfu=None, executed_mfu=None, **FIGURES)


def test_a_row_is_released_before_the_next(run, monkeypatch, request):
    gc.disable()  # which may happen to come in time
    request.addfinalizer(gc.enable)
    monkeypatch.setattr(gpu, "Step", FakeStep)
    monkeypatch.setattr(gpu, "data_wait_share", lambda *_: 0.0)
    monkeypatch.setattr(gpu, "choices", str)  # nothing is the default
    lines = run("--models", "S", "B", "--variants", "default", "attention=xla", "heads=dense")
    rows = [line for line in lines[2:] if "waits" not in line]
    failed = [line.split()[0:2] for line in rows if line.endswith(" not here: out of memory")]
    assert len(rows) == 6 and failed == [["S", "attention=xla"], ["B", "attention=xla"]]


def test_what_is_the_default_has_no_row_of_its_own(run, monkeypatch):
    """On a CPU "auto" is dense heads and "dots", and XLA attends to a few tokens."""
    monkeypatch.setattr(gpu, "Step", FakeStep)
    same, other = ("attention=xla", "heads=dense", "remat=dots"), ("heads=blocks",)
    lines = run("--variants", *same, *other)[2:]
    assert [line.split()[1:] for line in lines[:3]] == [
        [name, *"is the default".split()] for name in same
    ]
    assert "heads=blocks" in lines[3] and "images/s" in lines[3]


def test_no_row_begins_that_may_end_after_the_limit(run, monkeypatch):
    """After 110 s of 125 there is time for another row of S, of 10 s, and for none of B, of 100."""
    now, secs = [0.0], {"S": 10.0, "B": 100.0}

    def print_row(model, variant, options):
        print(f"{model} {variant} done")
        now[0] += secs[model]

    monkeypatch.setattr(gpu, "print_row", print_row)
    monkeypatch.setattr(gpu, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    order = ("--models", "S", "B", "L", "--variants", "default", "heads=dense")
    assert [line.split() for line in run(*order, "--limit-secs", "125")[2:]] == [
        "S default done".split(),
        "B default done".split(),
        "L default left out: 15 s are left".split(),  # not known: as long as the longest
        "S heads=dense done".split(),
        "B heads=dense left out: 5 s are left".split(),
        "L heads=dense left out: 5 s are left".split(),
    ]
    now[0] = 0.0
    assert len(run(*order[:3], "--limit-secs", "-1")[2:]) == len(gpu.VARIANTS) * 2
    assert now[0] == 0.0


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H200"])
def test_known_boards_need_no_note(kind):
    assert gpu.peak_flops(kind) > 0 and gpu.mfu_note(kind) is None


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "cpu"])
def test_another_board_of_a_known_name_has_no_mfu_and_a_line_says_why(kind):
    assert gpu.peak_flops(kind) is None
    assert gpu.mfu_note(kind).startswith(f"no MFU: the peak of {kind} is not known")


def test_a_row_without_a_peak_leaves_the_mfu_out():
    assert "MFU" not in str(gpu.Figures(model_mfu=None, executed_mfu=None, **FIGURES))
    assert ", MFU 40.0%, executed 30.0%, " in str(
        gpu.Figures(model_mfu=0.4, executed_mfu=0.3, **FIGURES)
    )
