"""The compile check, end to end: tiny steps for topologies that are not there."""

import dataclasses
import json
import re
import types

import jax
import pytest

from dinov2_jax import compile, config, startup
from dinov2_jax.config import REPOSITORY
from dinov2_jax.cost import memory
from dinov2_jax.cost.chips import TPUS
from dinov2_jax.cost.topology import Topology

TINY = {
    "crops.global_crop_size_px": 28,
    "crops.local_crop_size_px": 14,
    "crops.num_local_crops": 2,
    "model.variant": "custom",
    "model.patch_size": 7,
    "model.embed_dim": 64,
    "model.depth": 3,
    "model.num_heads": 2,
    "dino.num_prototypes": 256,
    "ibot.num_prototypes": 256,
    "dino.hidden_dim": 64,
    "ibot.hidden_dim": 64,
    "augment.blur_kernel_size_px": 3,
    "global_batch_size": 16,
    "group_size": 4,
}


TINY_TEXTS = [(key, str(value)) for key, value in TINY.items()]


def flags(topology: str, **changes) -> list[str]:
    keys = TINY | changes
    return [
        f"--config={REPOSITORY / 'configs' / 'vits14.py'}",
        f"--topology={topology}",
        *(f"--config.{key}={value}" for key, value in keys.items()),
    ]


@pytest.mark.usefixtures("libtpu")
def test_a_step_that_fits(tmp_path, capsys):
    file = tmp_path / "figures.json"
    hlo = tmp_path / "step.hlo"
    argv = [*flags("v5e:2x2"), "--breakdown", f"--json={file}", f"--hlo={hlo}"]
    assert compile.main(argv) == 0
    figures = json.loads(file.read_text())
    out = capsys.readouterr().out
    assert figures["fits"] and "fits:" in out
    assert (figures["devices"], figures["global_batch_size"]) == (4, 16)
    assert figures["num_prototypes"] == 256
    # Of the topology, not of this machine.
    assert figures["dtype"] == "bfloat16"
    assert {figures[name] for name in ("attention", "layer_norm", "drop_path_form")} == {"pallas"}
    assert figures["backward_kernels"] is None and "backward kernels" not in out  # fsdp is 1
    assert figures["heads"].startswith("by kernels") and figures["heads"] in out
    assert sum(figures["hbm_bytes"].values()) == figures["hbm_peak_bytes"]
    assert 0 < figures["hbm_peak_bytes"] < figures["hbm_limit_bytes"] == TPUS["v5e"].hbm_bytes
    chip, seconds = TPUS["v5e"], figures["estimated_step_seconds"]
    assert figures["estimated_mfu"] == pytest.approx(
        figures["executed_flops"] / (4 * chip.peak_flops * seconds)
    )
    by_part = figures["seconds_by_part"]
    assert sum(sum(kinds.values()) for kinds in by_part.values()) == pytest.approx(
        seconds, abs=1e-4
    )
    for part in ("attention", "mlp", "heads", "targets", "collectives", "augmentation"):
        assert sum(by_part[part].values()) > 0 and re.search(rf"^{part} ", out, re.MULTILINE)
    # The gradients of a replicated network are summed over the devices, at least once.
    assert figures["collective_bytes"]["all-reduce"] > 0
    assert not figures["warnings"]
    assert "is_scheduled=true" in hlo.read_text()


@pytest.mark.usefixtures("libtpu")
def test_a_step_that_does_not_fit(tmp_path, capsys):
    file = tmp_path / "figures.json"
    argv = flags("v5e:2x2", global_batch_size=262144, remat="none")
    argv += ["--fits_only", f"--json={file}"]
    assert compile.main(argv) == 1
    figures = json.loads(file.read_text())
    assert not figures["fits"]
    assert figures["hbm_peak_bytes"] > figures["hbm_limit_bytes"] == TPUS["v5e"].hbm_bytes
    assert figures["estimated_mfu"] is None
    assert sum(figures["hbm_bytes"].values()) == figures["hbm_peak_bytes"]
    out = capsys.readouterr().out
    assert re.search(r"does not fit: .* GiB too much \(arguments .*, temporaries .*\)", out)
    assert "what lowers it: mesh.fsdp" in out


# Of the quickest compile: one block, one loss, and no kernels.
SMALLEST = {
    "model.depth": 1,
    "crops.num_local_crops": 0,
    "ibot.loss_weight": 0.0,
    "koleo.loss_weight": 0.0,
    "attention": "xla",
    "layer_norm": "xla",
    "drop_path_form": "gather",
    "heads": "dense",
    "remat": "none",
}


@pytest.mark.usefixtures("libtpu")
def test_two_slices(tmp_path, capsys):
    file = tmp_path / "figures.json"
    argv = flags("v5e:2x2", **SMALLEST, group_size=2)
    assert compile.main([*argv, "--slices=2", f"--json={file}"]) == 0
    figures = json.loads(file.read_text())
    assert (figures["slices"], figures["devices"], figures["mesh"]["data"]) == (2, 8, 8)
    # A part of the gradients goes from slice to slice, and takes time.
    assert 0 < figures["collective_bytes"]["dcn"]
    assert "v5e:2x2 x 2 slices: 8 devices" in capsys.readouterr().out


@pytest.mark.usefixtures("libtpu", "cache")
def test_the_largest_batch_by_the_compiler(tmp_path, capsys, monkeypatch):
    """On chips with hardly more memory than the first batch takes: the second is refused.

    The first is compiled twice; from a cache it cannot be read back.
    """
    file, limits = tmp_path / "figures.json", []

    def memory_of(compiled, chip):
        limits.append(1.1 * memory.memory_of(compiled, chip).peak_bytes)
        return memory.memory_of(compiled, dataclasses.replace(chip, hbm_bytes=int(limits[0])))

    monkeypatch.setattr(compile, "memory_of", memory_of)
    argv = flags("v5e:2x2", **SMALLEST, group_size=4)
    assert compile.main([*argv, "--find-max-batch", "--fits_only", f"--json={file}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["global_batch_size=16 fits", "global_batch_size=32 does not fit"]
    figures = json.loads(file.read_text())
    assert figures["fits"] and figures["global_batch_size"] == 16
    assert len(limits) == 3 and limits[2] == limits[0] < limits[1]  # the last is the full check


@pytest.mark.usefixtures("cuda")
def test_gpus_too(tmp_path):
    """Memory and collectives; there is no clock to estimate by."""
    file = tmp_path / "figures.json"
    assert compile.main([*flags("cuda:h100:2x2"), f"--json={file}"]) == 0
    figures = json.loads(file.read_text())
    assert (figures["devices"], figures["dtype"]) == (4, "bfloat16")
    assert figures["attention"] == "xla"
    assert figures["hbm_peak_bytes"] > 0 and figures["collective_bytes"]["all-reduce"] > 0
    assert figures["estimated_step_seconds"] is None


@pytest.mark.parametrize(
    ("platform", "attention", "expected"),
    [
        ("gpu", "auto", "xla"),
        ("cuda", "auto", "xla"),
        ("tpu", "auto", "auto"),
        ("gpu", "xla", "xla"),
        ("cuda", "pallas", "pallas"),
        ("cuda", "by_head", "by_head"),
    ],
)
def test_no_gpu_no_cudnn(platform, attention, expected):
    texts = [*TINY_TEXTS, ("attention", attention)]
    cfg = config.load_config(str(REPOSITORY / "configs/vits14.py"), texts, needs_data=False)
    assert compile.without_cudnn(cfg, platform=platform).attention == expected
    assert cfg.attention == attention
    if attention in ("pallas", "by_head"):  # as a run would
        device = types.SimpleNamespace(platform=platform, device_kind="NVIDIA H100")
        with pytest.raises(config.ConfigError, match=rf"attention='{attention}' needs .* 'xla'"):
            startup.build_network(compile.without_cudnn(cfg, platform=platform), device)
    with cfg.unlocked():
        cfg.attention = "cudnn"
    if platform != "tpu":
        with pytest.raises(config.ConfigError, match=r"attention=cudnn cannot be .* at auto"):
            compile.without_cudnn(cfg, platform=platform)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology=v5e:2x2"], "--config"),
        ([f"--config={REPOSITORY / 'configs' / 'vits14.py'}"], "--topology"),
        (flags("v9:2x2"), r"v9:2x2 must be CHIP:SHAPE, such as .*v5e:16x16"),
        (flags("v5e"), "v5e must be CHIP:SHAPE"),
        (flags("v5e:0x2"), "v5e:0x2 must be CHIP:SHAPE"),
        (flags("cuda:v100:1x8"), "cuda:v100:1x8 must be CHIP:SHAPE.*GPUs: a100, h100, h200"),
        (flags("cuda:h100:8"), "the shape must have 2 axes, as cuda:h100:1x8 has"),
        (flags("v5e:2x2x2"), "the shape must have 2 axes"),
        (flags("v5e:16x32"), "has 512 chips, but a slice of v5e at most 256; join several by --sl"),
        ([*flags("v5e:2x2"), "--slices=0"], "--slices=0 must be at least 1"),
        ([*flags("v5e:2x2"), "--slices=two"], "slices"),
        ([*flags("v5e:2x2"), "--find_max_batches"], "did you mean --find_max_batch"),
        (flags("v5e:2x2", **{"optim.clip_nrom": 3}), "clip_norm"),
        ([*flags("v5e:2x2"), "--json=no/such/file"], "--json=no/such/file: there is no folder no/"),
        ([*flags("v5e:2x2"), "--hlo=no/file"], "--hlo=no/file: there is no folder no; create it"),
        ([*flags("v5e:2x2"), "--json=."], r"--json=\. is a folder; name a file in it"),
        ([*flags("v5e:2x2"), "--fits_only", "--breakdown"], "--fits_only leaves out"),
    ],
)
def test_wrong_input_is_one_line(argv, message, capsys):
    assert compile.main(argv) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_a_compiler_that_fails_is_one_line_and_not_a_step_that_does_not_fit(monkeypatch, capsys):
    """The real `check`, on this machine's devices, with a compiler that has a bug."""

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed\nat line 7")

    chip = dataclasses.replace(TPUS["v5e"], name="cpu")
    topology = Topology("cpu:1", 1, chip, jax.devices()[:1])
    monkeypatch.setattr(compile, "open_topology", lambda *_, **__: topology)
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    assert compile.main([*flags("v5e:2x2"), "--config.compiler_preset="]) == 2
    error = capsys.readouterr().err
    assert error == "error: the compiler failed: INTERNAL: Mosaic failed at line 7\n"


def test_a_mistake_of_ours_does_not_say_that_the_step_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(compile, "open_topology", lambda *_, **__: 1 / 0)
    assert compile.main(flags("v5e:2x2")) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (flags("v5e:3x5"), "v5e:3x5 is no slice that the compiler knows"),
        (flags("v5e:2x2", **{"mesh.data": 3, "mesh.fsdp": 2}), "mesh"),
        (flags("v5e:2x2", group_size=16), "group"),
        (flags("v5e:2x2", attention="cudnn"), "cudnn"),
        ([*flags("v5e:2x2", **{"mesh.fsdp": 8, "mesh.data": 1}), "--slices=2"], "slices"),
    ],
)
def test_what_the_devices_do_not_allow_is_one_line(argv, message, capsys):
    assert compile.main(argv) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
