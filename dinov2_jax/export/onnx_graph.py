"""ONNX: the network written out operation by operation with the `onnx` package.

In: a model whose position table is that of the image size. Out: a graph of standard operators
(opset 17), images `[b, height, width, c]` in, `cls`, `registers` and `patches` out; constants have
the reference's names. The arithmetic is that of `dinov2_jax.models`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dinov2_jax.convert.spec import ModelSpec
from dinov2_jax.export.check import Run
from dinov2_jax.model import Model

# The first with LayerNormalization, and the format's version of its time: old runtimes read it.
OPSET, IR_VERSION = 17, 8
# A protobuf message ends at 2 GiB; larger weights lie in a file of their own.
LARGEST_BYTES = 2**31 - 2**20


def require_onnx():
    """Imports onnx and onnxruntime; ModuleNotFoundError says how to get them."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "ONNX export needs onnx, and onnxruntime for its check; "
            "pip install 'dinov2_jax[export]' or pip install onnx onnxruntime"
        ) from error
    return onnx, onnxruntime


def write_onnx(
    path: pathlib.Path,
    model: Model,
    facts: Mapping[str, str],
    *,
    height: int,
    width: int,
) -> Run:
    """Writes `path`, with `facts` as its metadata; weights above 2 GB go to `{path}.data`.

    Returns:
      The file in onnxruntime, as a function of images.
    """
    onnx, onnxruntime = require_onnx()
    graph = _Graph(onnx)
    outputs = _network(graph, model.spec, jax.tree.map(np.asarray, model.params))
    value_info = onnx.helper.make_tensor_value_info
    float32 = onnx.TensorProto.FLOAT
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "dinov2",
            [value_info("images", float32, ["b", height, width, model.spec.in_channels])],
            [value_info(name, float32, ["b", *shape]) for name, shape in outputs.items()],
            graph.constants,
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="dinov2_jax",
    )
    onnx.helper.set_model_props(proto, dict(facts))
    size = sum(len(constant.raw_data) for constant in graph.constants)
    onnx.save_model(
        proto,
        path,
        save_as_external_data=size > LARGEST_BYTES,
        location=f"{path.name}.data",
    )
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: dict(
        zip(outputs, session.run(list(outputs), {"images": images}), strict=True)
    )


class _Graph:
    """Nodes and constants in the making; every method returns the name of what it added."""

    def __init__(self, onnx):
        self.onnx, self.nodes, self.constants = onnx, [], []

    def constant(self, name: str, array) -> str:
        array = np.ascontiguousarray(array)
        if array.dtype != np.int64:
            array = array.astype(np.float32)
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, inputs: list[str], name: str, **attributes) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def split(self, x: str, sizes: list[int], names: list[str], *, axis: int) -> list[str]:
        lengths = self.constant(f"{names[0]}.sizes", np.int64(sizes))
        node = self.onnx.helper.make_node("Split", [x, lengths], names, axis=axis)
        self.nodes.append(node)
        return names

    def reshape(self, x: str, shape: list[int], name: str) -> str:
        return self.node("Reshape", [x, self.constant(f"{name}.shape", np.int64(shape))], name)

    def scale(self, x: str, factor, name: str) -> str:
        return self.node("Mul", [x, self.constant(f"{name}.factor", factor)], name)

    def dense(self, x: str, params: Mapping[str, Any], name: str) -> str:
        kernel = self.constant(f"{name}.kernel", params["kernel"])
        bias = self.constant(f"{name}.bias", params["bias"])
        product = self.node("MatMul", [x, kernel], f"{name}.product")
        return self.node("Add", [product, bias], f"{name}.output")

    def layer_norm(self, x: str, params: Mapping[str, Any], name: str) -> str:
        constants = [self.constant(f"{name}.{key}", params[key]) for key in ("scale", "bias")]
        return self.node(
            "LayerNormalization", [x, *constants], f"{name}.output", axis=-1, epsilon=1e-6
        )


def _network(graph: _Graph, spec: ModelSpec, params: Mapping[str, Any]) -> dict[str, list[int]]:
    """Adds the network on `images`; returns its outputs and their shapes without the batch."""
    d, r, n = spec.embed_dim, spec.num_register_tokens, params["pos_embed"].shape[1] - 1
    x = _embed(graph, spec, params, num_patches=n)
    for i in range(spec.depth):
        x = _block(graph, x, spec, _layer(params["blocks"], i), f"blocks.{i}")
    x = graph.layer_norm(x, params["norm"], "norm")
    if r:
        graph.split(x, [1, r, n], ["cls_token_output", "registers", "patches"], axis=1)
    else:
        graph.split(x, [1, n], ["cls_token_output", "patches"], axis=1)
    graph.reshape("cls_token_output", [-1, d], "cls")
    return {"cls": [d], **({"registers": [r, d]} if r else {}), "patches": [n, d]}


def _layer(blocks, i: int):
    """The parameters of one block, of those stacked over all."""
    if isinstance(blocks, Mapping):
        return {name: _layer(branch, i) for name, branch in blocks.items()}
    return blocks[i]


def _embed(graph: _Graph, spec: ModelSpec, params: Mapping[str, Any], *, num_patches: int) -> str:
    d, p = spec.embed_dim, spec.patch_size
    proj, pos_embed = params["patch_embed"]["proj"], params["pos_embed"]
    pixels = graph.node("Transpose", ["images"], "images.nchw", perm=[0, 3, 1, 2])
    kernel = graph.constant("patch_embed.proj.kernel", np.transpose(proj["kernel"], (3, 2, 0, 1)))
    bias = graph.constant("patch_embed.proj.bias", proj["bias"])
    grid = graph.node("Conv", [pixels, kernel, bias], "patch_embed.grid", strides=[p, p])
    channels_first = graph.reshape(grid, [0, d, num_patches], "patch_embed.channels_first")
    tokens = graph.node("Transpose", [channels_first], "patch_embed.output", perm=[0, 2, 1])
    table = graph.constant("pos_embed.patches", pos_embed[:, 1:])
    patches = graph.node("Add", [tokens, table], "patches.embedded")
    prefix = [params["cls_token"] + pos_embed[:, :1]]
    if spec.num_register_tokens:
        prefix.append(params["register_tokens"])
    prefix = graph.constant("prefix_tokens", np.concatenate(prefix, axis=1))
    batch = graph.node("Shape", ["images"], "batch", start=0, end=1)
    ones = graph.constant("prefix_tokens.repeats", np.int64([1, 1]))
    repeats = graph.node("Concat", [batch, ones], "prefix_tokens.shape", axis=0)
    prefix = graph.node("Expand", [prefix, repeats], "prefix_tokens.expanded")
    return graph.node("Concat", [prefix, patches], "tokens", axis=1)


def _block(graph: _Graph, x: str, spec: ModelSpec, params: Mapping[str, Any], name: str) -> str:
    ffn = {"mlp": _mlp, "swiglu": _swiglu}[spec.ffn]
    for norm, branch, key, scale in (("norm1", _attention, "attn", "ls1"),
                                     ("norm2", ffn, "mlp", "ls2")):  # fmt: skip
        normalised = graph.layer_norm(x, params[norm], f"{name}.{norm}")
        residual = branch(graph, normalised, spec, params[key], f"{name}.{key}")
        residual = graph.scale(residual, params[scale]["gamma"], f"{name}.{scale}")
        x = graph.node("Add", [x, residual], f"{name}.{key}.sum")
    return x


def _attention(graph, x: str, spec: ModelSpec, params: Mapping[str, Any], name: str) -> str:
    d, heads = spec.embed_dim, spec.num_heads
    qkv = graph.dense(x, params["qkv"], f"{name}.qkv")
    parts = graph.split(qkv, [d, d, d], [f"{name}.{part}" for part in "qkv"], axis=-1)
    parts = [graph.reshape(part, [0, 0, heads, d // heads], f"{part}.heads") for part in parts]
    q, k, v = (
        graph.node("Transpose", [part], f"{part}.first", perm=perm)
        for part, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    q = graph.scale(q, np.float32((d // heads) ** -0.5), f"{name}.q.scaled")
    logits = graph.node("MatMul", [q, k], f"{name}.logits")
    probs = graph.node("Softmax", [logits], f"{name}.probs", axis=-1)
    x = graph.node("MatMul", [probs, v], f"{name}.heads")
    x = graph.node("Transpose", [x], f"{name}.tokens", perm=[0, 2, 1, 3])
    return graph.dense(
        graph.reshape(x, [0, 0, d], f"{name}.merged"), params["proj"], f"{name}.proj"
    )


def _mlp(graph: _Graph, x: str, spec: ModelSpec, params: Mapping[str, Any], name: str) -> str:
    x = graph.dense(x, params["fc1"], f"{name}.fc1")
    # GELU as x / 2 (1 + erf(x / sqrt 2)): the operator itself came with opset 20.
    erf = graph.node("Erf", [graph.scale(x, np.float32(0.5**0.5), f"{name}.z")], f"{name}.erf")
    one = graph.constant(f"{name}.one", np.float32(1))
    twice = graph.node("Mul", [x, graph.node("Add", [erf, one], f"{name}.2cdf")], f"{name}.2gelu")
    return graph.dense(graph.scale(twice, np.float32(0.5), f"{name}.gelu"), params["fc2"],
                       f"{name}.fc2")  # fmt: skip


def _swiglu(graph: _Graph, x: str, spec: ModelSpec, params: Mapping[str, Any], name: str) -> str:
    x = graph.dense(x, params["w12"], f"{name}.w12")
    sizes = [spec.hidden_dim, spec.hidden_dim]
    gate, value = graph.split(x, sizes, [f"{name}.gate", f"{name}.value"], axis=-1)
    sigmoid = graph.node("Sigmoid", [gate], f"{name}.sigmoid")
    silu = graph.node("Mul", [gate, sigmoid], f"{name}.silu")
    return graph.dense(graph.node("Mul", [silu, value], f"{name}.gated"), params["w3"],
                       f"{name}.w3")  # fmt: skip
