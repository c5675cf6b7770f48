"""Exported files: any batch, one size, the source's numbers; whole or not at all."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax import load
from dinov2_jax.convert import ModelSpec, read_model, write_model
from dinov2_jax.convert.spec import METADATA_KEY
from dinov2_jax.export import ExportError, check, export_model, onnx_graph, stablehlo
from dinov2_jax.export.write import INPUT_KEY
from dinov2_jax.model import Model
from tests.convert.models import assert_same, make_params, make_spec
from tests.parity import require

pytestmark = pytest.mark.usefixtures("cache")
# Sums in another order; measured 1e-6 at most.
TOLERANCE = 1e-5
needs_onnx = pytest.mark.parity
SIZE = (12, 20)  # the stored positions are 3 x 3 of 4 px


def make_source(folder, name="registers", **settings):
    """A safetensors file with a tiny model."""
    spec = make_spec(name, **({"depth": 2} | settings))
    write_model(folder / "in.safetensors", spec, make_params(spec), format="safetensors")
    return folder / "in.safetensors"


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path)


def images(b: int, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((b, height, width, 3), np.float32)


def assert_outputs(outputs, source, x):
    """Names, shapes and numbers of the source's own outputs."""
    expected = load(source)(x)
    names = {"cls", "patches"} | ({"registers"} if expected.registers.size else set())
    assert set(outputs) == names
    for name in names:
        right = np.asarray(getattr(expected, name))
        np.testing.assert_allclose(outputs[name], right, rtol=0, atol=TOLERANCE * abs(right).max())


def read_stablehlo(path):
    return jax.export.deserialize(bytearray(path.read_bytes()))


def read_onnx(path):
    onnx, onnxruntime = require("onnx", "onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return onnx.load(path), lambda x: dict(
        zip(names, session.run(None, {"images": x}), strict=True)
    )


@pytest.mark.parametrize("name", ["registers", "mlp"])
def test_stablehlo(tmp_path, name):
    source, target = make_source(tmp_path, name), tmp_path / "out.stablehlo"
    differences = export_model(source, target, size=SIZE)
    assert max(differences.values()) < TOLERANCE
    exported = read_stablehlo(target)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for b in (1, 4):
        assert_outputs(exported.call(images(b)), source, images(b))
    with pytest.raises(ValueError, match="12"):
        exported.call(images(1, 12, 12))


@needs_onnx
@pytest.mark.parametrize("name", ["registers", "mlp", "swiglu", "registers_swiglu"])
def test_onnx(tmp_path, name):
    require("onnx", "onnxruntime")
    source, target = make_source(tmp_path, name), tmp_path / "out.onnx"
    differences = export_model(source, target, size=SIZE)
    assert max(differences.values()) < TOLERANCE
    _, run = read_onnx(target)
    for b in (1, 4):
        assert_outputs(run(images(b)), source, images(b))


@needs_onnx
def test_onnx_weights_beside_the_graph(source, tmp_path, monkeypatch):
    require("onnx", "onnxruntime")
    monkeypatch.setattr(onnx_graph, "LARGEST_BYTES", 1000)
    export_model(source, tmp_path / "out.onnx", size=SIZE)
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.onnx", "out.onnx.data"]
    assert_outputs(read_onnx(tmp_path / "out.onnx")[1](images(2)), source, images(2))
    with pytest.raises(FileExistsError, match=r"out\.onnx is there already"):
        export_model(source, tmp_path / "out.onnx")


def test_safetensors_is_the_archive(source, tmp_path):
    differences = export_model(source, tmp_path / "out.safetensors")
    assert set(differences.values()) == {0.0}
    spec, params = read_model(tmp_path / "out.safetensors")
    right_spec, right_params = read_model(source)
    assert spec == right_spec
    assert_same(params, right_params)


def test_facts_and_positions_of_stablehlo(source, tmp_path):
    export_model(source, tmp_path / "out.stablehlo", size=SIZE)
    text = read_stablehlo(tmp_path / "out.stablehlo").mlir_module()
    assert "tensor<1x10x16xf32>" not in text  # the stored table, 3 x 3 and CLS
    assert "tensor<1x16x16xf32>" in text  # that of 3 x 5
    check_facts(json.loads((tmp_path / "out.stablehlo.json").read_text()))


@needs_onnx
def test_facts_and_positions_of_onnx(source, tmp_path):
    require("onnx", "onnxruntime")
    export_model(source, tmp_path / "out.onnx", size=SIZE)
    model, _ = read_onnx(tmp_path / "out.onnx")
    check_facts({entry.key: entry.value for entry in model.metadata_props})
    shapes = {constant.name: list(constant.dims) for constant in model.graph.initializer}
    assert shapes["pos_embed.patches"] == [1, 15, 16]
    assert shapes["prefix_tokens"] == [1, 5, 16]
    assert shapes["blocks.1.attn.qkv.kernel"] == [16, 48]
    assert "Resize" not in {node.op_type for node in model.graph.node}


def check_facts(facts):
    spec = ModelSpec.from_json(facts[METADATA_KEY])
    assert spec == make_spec("registers", pos_embed_grid=(3, 5))
    named = json.loads(facts[INPUT_KEY])
    assert (named["height_px"], named["width_px"]) == SIZE
    assert (tuple(named["mean"]), tuple(named["std"])) == (spec.mean, spec.std)


def test_half_precision_weights_are_exported_in_float32(tmp_path):
    spec = make_spec("registers")
    params = make_params(spec, dtype=jnp.bfloat16)
    write_model(tmp_path / "in.safetensors", spec, params, format="safetensors")
    export_model(tmp_path / "in.safetensors", tmp_path / "out.stablehlo")
    x = images(1, 12, 12)
    outputs = read_stablehlo(tmp_path / "out.stablehlo").call(x)
    # Sums of tokens and positions would be rounded to bfloat16 before the first block.
    right = Model(spec, jax.tree.map(np.float32, params))(x).cls
    assert outputs["cls"].dtype == jnp.float32
    np.testing.assert_allclose(outputs["cls"], right, rtol=0, atol=TOLERANCE * abs(right).max())


@pytest.mark.parametrize("format", ["stablehlo", "safetensors"])
def test_a_failing_check_leaves_nothing(source, tmp_path, monkeypatch, format):
    monkeypatch.setattr(check, "BOUND", -1.0)
    with pytest.raises(ExportError, match=r"differs from its source by cls .* of the largest"):
        export_model(source, tmp_path / f"out.{format}")
    assert os.listdir(tmp_path) == ["in.safetensors"]


@needs_onnx
def test_what_differs_fails(source, tmp_path, monkeypatch):
    """A GELU of another kind, as a mistake that shapes do not show."""
    require("onnx", "onnxruntime")
    write_dense = onnx_graph._Graph.scale

    def scale(graph, x, factor, name):
        return write_dense(graph, x, factor * (0.99 if name.endswith(".z") else 1), name)

    monkeypatch.setattr(onnx_graph._Graph, "scale", scale)
    with pytest.raises(ExportError, match="differs"):
        export_model(source, tmp_path / "out.onnx")
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_an_old_target_survives_a_failure(source, tmp_path, monkeypatch):
    target = tmp_path / "out.stablehlo"
    export_model(source, target)
    before = target.read_bytes()
    with pytest.raises(FileExistsError, match="is there already; --overwrite replaces it"):
        export_model(source, target)
    monkeypatch.setattr(check, "BOUND", -1.0)
    with pytest.raises(ExportError):
        export_model(source, target, size=SIZE, overwrite=True)
    assert target.read_bytes() == before
    monkeypatch.undo()
    export_model(source, target, size=SIZE, overwrite=True)
    assert target.read_bytes() != before


def test_too_large_for_stablehlo(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo, "LARGEST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"the weights are .* GB; choose onnx or safetensors"):
        export_model(source, tmp_path / "out.stablehlo")
    assert os.listdir(tmp_path) == ["in.safetensors"]
