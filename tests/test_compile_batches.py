"""The search for the largest batch that fits, with stand-ins for the compiler."""

import jax
import pytest

from dinov2_jax import compile, config
from dinov2_jax.config import REPOSITORY
from dinov2_jax.cost import memory
from tests.test_compile import TINY_TEXTS


def test_max_batch_is_found_by_doubling_and_halving(monkeypatch, capsys):
    tried, last = [], []

    def check(cfg, topology, **settings):
        tried.append(cfg.global_batch_size)
        last[:] = [settings]
        return {"fits": cfg.global_batch_size <= 44, "batch": cfg.global_batch_size}, None

    monkeypatch.setattr(compile, "check", check)
    cfg = config.load_config(
        str(REPOSITORY / "configs" / "vits14.py"),
        TINY_TEXTS,
        needs_data=False,
    )

    class EightDevices:
        devices = jax.devices()

    assert compile.find_max_batch(cfg, EightDevices)[0] == {"fits": True, "batch": 32}
    assert tried == [32, 64, 32]  # 8 shards of groups of 4; then the check of the best
    assert last == [{"is_quick": False, "hlo_file": None}]
    tried.clear()
    EightDevices.devices = jax.devices()[:1]
    found = compile.find_max_batch(cfg, EightDevices, is_quick=True, hlo_file="step.hlo")
    assert found[0] == {"fits": True, "batch": 44}
    assert last == [{"is_quick": True, "hlo_file": "step.hlo"}]
    assert tried == [4, 8, 16, 32, 64, 48, 40, 44, 44]
    assert "global_batch_size=48 does not fit" in capsys.readouterr().out


class OneDevice:
    devices = jax.devices()[:1]


@pytest.mark.parametrize(("most", "tried"), [(36, [44, 40, 36]), (0, [*range(44, 0, -4)])])
def test_a_batch_that_does_not_fit_in_full_gives_way_to_the_next_smaller(
    monkeypatch, capsys, most, tried
):
    """With a compiler that needs more memory in full than quickly."""
    in_full = []

    def check(cfg, topology, *, is_quick=False, hlo_file=None):
        if not is_quick:
            in_full.append(cfg.global_batch_size)
        limit = 44 if is_quick else most
        fits = cfg.global_batch_size <= limit
        return {"fits": fits, "batch": cfg.global_batch_size}, hlo_file

    monkeypatch.setattr(compile, "check", check)
    cfg = config.load_config(
        str(REPOSITORY / "configs" / "vits14.py"), TINY_TEXTS, needs_data=False
    )
    found = compile.find_max_batch(cfg, OneDevice, hlo_file="step.hlo")
    assert found == ({"fits": most > 0, "batch": tried[-1]}, "step.hlo")
    assert in_full == tried
    assert "global_batch_size=40 does not fit when compiled in full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fails_at", "is_quick", "found"),
    [(4, True, "none"), (64, True, "global_batch_size=32"), (44, False, "global_batch_size=44")],
)
def test_a_compiler_that_fails_in_the_search_leaves_what_was_found(
    monkeypatch, fails_at, is_quick, found
):
    def check(cfg, topology, **settings):
        if cfg.global_batch_size == fails_at and settings["is_quick"] == is_quick:
            raise memory.CompilerError("the compiler failed: INTERNAL")
        return {"fits": cfg.global_batch_size <= 44}, None

    monkeypatch.setattr(compile, "check", check)
    cfg = config.load_config(
        str(REPOSITORY / "configs" / "vits14.py"), TINY_TEXTS, needs_data=False
    )
    message = f"^global_batch_size={fails_at}: the compiler failed: INTERNAL; .* compile: {found}$"
    with pytest.raises(memory.CompilerError, match=message):
        compile.find_max_batch(cfg, OneDevice)


def test_no_batch_fits(monkeypatch):
    monkeypatch.setattr(compile, "check", lambda *_, **__: ({"fits": False}, None))
    cfg = config.load_config(
        str(REPOSITORY / "configs" / "vits14.py"), TINY_TEXTS, needs_data=False
    )
    assert compile.find_max_batch(cfg, OneDevice) == ({"fits": False}, None)
