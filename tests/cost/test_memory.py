"""Memory of what was compiled, and of what was refused."""

import types

import pytest

from dinov2_jax.cost.chips import TPUS
from dinov2_jax.cost.memory import CompilerError, memory_of, memory_of_failure

V5E = TPUS["v5e"]


def stats(**sizes):
    names = ("argument", "output", "alias", "temp", "generated_code")
    found = {f"{name}_size_in_bytes": sizes.get(name, 0) for name in names}
    analysis = types.SimpleNamespace(**found)
    return types.SimpleNamespace(memory_analysis=lambda: analysis)


def test_donated_outputs_count_once():
    memory = memory_of(stats(argument=10, output=12, alias=9, temp=5, generated_code=1), V5E)
    assert memory.by_kind == {"arguments": 10, "outputs": 3, "temporaries": 5, "program": 1}
    assert memory.peak_bytes == 19 and memory.fits


@pytest.mark.parametrize(("over", "fits"), [(0, True), (1, False)])
def test_the_limit(over, fits):
    assert memory_of(stats(temp=V5E.hbm_bytes + over), V5E).fits == fits


def test_a_refusal_says_by_how_much():
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm.
        Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.
        Total hbm usage >= 20.50G:
            reserved        0.25G
            program        18.25G
                HLO temp       18.00G
                global        256.00K
            arguments       2.00G
            output       0.00B"""
    memory = memory_of_failure(message, V5E, argument_bytes=7)
    assert not memory.fits
    assert (memory.peak_bytes, memory.limit_bytes) == (int(20.5 * 2**30), int(15.75 * 2**30))
    parts = {"reserved": 0.25, "program": 18.25, "HLO temp": 18, "global": 2**-12, "arguments": 2}
    assert memory.by_kind == {kind: size * 2**30 for kind, size in (parts | {"output": 0}).items()}


def test_an_early_refusal_is_of_the_temporaries_alone():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (20.50G) exceeds available HBM (15.75G)."
    )
    memory = memory_of_failure(message, V5E, argument_bytes=2**30)
    assert not memory.fits
    assert memory.by_kind == {"arguments": 2**30, "temporaries": int(20.5 * 2**30)}
    assert (memory.peak_bytes, memory.limit_bytes) == (int(21.5 * 2**30), int(15.75 * 2**30))


@pytest.mark.parametrize("message", ["INTERNAL: a bug", "RESOURCE_EXHAUSTED: of something"])
def test_other_failures_are_not_hidden(message):
    with pytest.raises(CompilerError, match=message):
        memory_of_failure(message, V5E)
