"""Which compilers a topology needs; what they compile: tests/test_compile.py."""

import pytest

from dinov2_jax.cost import topology


@pytest.mark.parametrize("version", [12, 13])
def test_either_plugin_of_cuda_compiles_for_gpus(monkeypatch, version):
    monkeypatch.setattr(topology, "is_installed", f"jax_plugins.xla_cuda{version}".__eq__)
    monkeypatch.setattr(topology, "_gpus", lambda kind, shape: [kind, shape])
    assert topology.open_topology("cuda:h100:1x8").devices == ["h100", "1x8"]


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(topology, "is_installed", lambda module: False)
    cure = r"pip install 'dinov2_jax\[cuda12\]' or 'dinov2_jax\[cuda13\]'$"
    with pytest.raises(topology.TopologyError, match=f"=cuda:h100:1x8 needs a compiler.*{cure}"):
        topology.open_topology("cuda:h100:1x8")
    with pytest.raises(topology.TopologyError, match=r"pip install 'dinov2_jax\[tpu\]'$"):
        topology.open_topology("v5e:2x2")
