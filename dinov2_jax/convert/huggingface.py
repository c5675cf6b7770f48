"""transformers' folders: `Dinov2Model`, `Dinov2WithRegistersModel` and their image classifiers.

In and out: the reference's names, with `linear_head.` for the classifier. Names follow the
conversion scripts in transformers/models/dinov2 (Apache-2.0), whose files split queries, keys and
values. Numpy only: config.json and preprocessor_config.json are written as `from_pretrained`
reads them.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from dinov2_jax.convert import lazy
from dinov2_jax.convert.spec import ModelSpec

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
QKV = ("query", "key", "value")

# (the reference's, transformers') as exact names or as parts of a block's names.
EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
IN_BLOCKS = {
    "attn.proj.": "attention.output.dense.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12.": "mlp.weights_in.",
    "mlp.w3.": "mlp.weights_out.",
    # The same on both sides.
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
}
PREFIXES = {False: "dinov2.", True: "dinov2_with_registers."}
CLASSES = {False: "Dinov2", True: "Dinov2WithRegisters"}


def is_huggingface(names: Mapping[str, Any]) -> bool:
    """Whether names are those of transformers."""
    return any(name.endswith("embeddings.cls_token") for name in names)


def from_huggingface(flat: Mapping[str, lazy.Arrays]) -> tuple[dict[str, lazy.Arrays], list[str]]:
    """The reference's names for transformers'; and the problems, one line each.

    With a classifier the result has the prefixes "backbone." and "linear_head.", else none.
    """
    prefix = next((p for p in PREFIXES.values() if any(n.startswith(p) for n in flat)), "")
    ours = "backbone." if "classifier.weight" in flat or "classifier.bias" in flat else ""
    named, thirds, problems = {}, {}, []
    exact = {theirs: name for name, theirs in EMBEDDINGS.items()}
    for full_name, array in flat.items():
        name = full_name.removeprefix(prefix)
        if full_name.startswith("classifier."):
            named[full_name.replace("classifier.", "linear_head.")] = array
        elif name in exact:
            named[ours + exact[name]] = array
        elif match := re.fullmatch(
            r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", name
        ):
            block, third, leaf = match.groups()
            thirds.setdefault(f"{ours}blocks.{block}.attn.qkv.{leaf}", {})[third] = array
        elif (match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)) and (
            part := _replace_start(match[2], {v: k for k, v in IN_BLOCKS.items()})
        ):
            named[f"{ours}blocks.{match[1]}.{part}"] = array
        else:
            problems.append(f"{full_name} has no rule")
    for name, parts in thirds.items():
        shapes = {parts[third].shape for third in QKV if third in parts}
        if len(parts) < 3 or len(shapes) > 1:
            problems.append(f"{name} needs query, key and value of one shape, not {sorted(parts)}")
        # With a part missing, what is there stands for it: the name is not reported twice.
        named[name] = lazy.concatenate([parts.get(t, next(iter(parts.values()))) for t in QKV])
    return named, problems


def to_huggingface(flat: Mapping[str, lazy.Arrays]) -> dict[str, lazy.Arrays]:
    """transformers' names for the reference's, of a backbone with or without `linear_head`."""
    is_classifier = "linear_head.weight" in flat
    has_registers = any(name.endswith("register_tokens") for name in flat)
    prefix = PREFIXES[has_registers] if is_classifier else ""
    named = {}
    for full_name, array in flat.items():
        name = full_name.removeprefix("backbone.")
        if name.startswith("linear_head."):
            named[name.replace("linear_head.", "classifier.")] = array
        elif name in EMBEDDINGS:
            named[prefix + EMBEDDINGS[name]] = array
        else:
            _, block, part = name.split(".", 2)
            layer = f"{prefix}encoder.layer.{block}."
            if part.startswith("attn.qkv."):
                leaf = part.removeprefix("attn.qkv.")
                for third, piece in zip(QKV, lazy.split(array, 3), strict=True):
                    named[f"{layer}attention.attention.{third}.{leaf}"] = piece
            else:
                named[layer + _replace_start(part, IN_BLOCKS)] = array
    return named


def _replace_start(name: str, table: Mapping[str, str]) -> str | None:
    for start, other in table.items():
        if name.startswith(start):
            return other + name.removeprefix(start)
    return None


def read_facts(folder: pathlib.Path) -> dict[str, Any]:
    """What config.json and preprocessor_config.json know: attributes of `ModelSpec`.

    Raises:
      ValueError: a file that is no JSON, or of another kind of model.
    """
    facts = {}
    if model := _read_json(folder / CONFIG_FILE):
        if model.get("model_type") not in ("dinov2", "dinov2_with_registers"):
            raise ValueError(
                f"{folder / CONFIG_FILE}: model_type={model.get('model_type')!r} must be "
                "'dinov2' or 'dinov2_with_registers'"
            )
        if model.get("layer_norm_eps", 1e-6) != 1e-6 or model.get("hidden_act", "gelu") != "gelu":
            raise ValueError(
                f"{folder / CONFIG_FILE} must have layer_norm_eps=1e-6 and hidden_act='gelu': "
                "other DINOv2 models do not exist"
            )
        facts["num_heads"] = model.get("num_attention_heads")
    if processor := _read_json(folder / PREPROCESSOR_FILE):
        facts["mean"], facts["std"] = processor.get("image_mean"), processor.get("image_std")
        if "shortest_edge" in processor.get("size", {}):
            facts["resize_size_px"] = processor["size"]["shortest_edge"]
        if "height" in processor.get("crop_size", {}):
            facts["crop_size_px"] = processor["crop_size"]["height"]
    return facts


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON ({error}); fetch it again") from error


def make_configs(spec: ModelSpec, *, num_classes: int | None) -> dict[str, dict]:
    """The two JSON files of a folder, by file name.

    Args:
      spec: the model.
      num_classes: of the classifier; None without one.

    Raises:
      ValueError: transformers cannot express this model.
    """
    rows, cols = spec.pos_embed_grid
    if rows != cols:
        raise ValueError(
            f"pos_embed_grid={spec.pos_embed_grid} must be square: transformers takes the square "
            "root of the number of positions; write --format safetensors instead"
        )
    if spec.mlp_ratio != math.floor(spec.mlp_ratio):
        raise ValueError(
            f"mlp_ratio={spec.mlp_ratio:g} must be an integer: transformers has no other; write "
            "--format safetensors instead"
        )
    has_registers = spec.num_register_tokens > 0
    config = {
        "architectures": [
            CLASSES[has_registers] + ("Model" if num_classes is None else "ForImageClassification")
        ],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": spec.embed_dim,
        "image_size": rows * spec.patch_size,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "mlp_ratio": int(spec.mlp_ratio),
        "model_type": "dinov2_with_registers" if has_registers else "dinov2",
        "num_attention_heads": spec.num_heads,
        "num_channels": spec.in_channels,
        "num_hidden_layers": spec.depth,
        "patch_size": spec.patch_size,
        "qkv_bias": True,
        "use_swiglu_ffn": spec.ffn == "swiglu",
    }
    if has_registers:
        config["num_register_tokens"] = spec.num_register_tokens
    if num_classes is not None:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_classes)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(num_classes)}
    preprocessor = {
        "crop_size": {"height": spec.crop_size_px, "width": spec.crop_size_px},
        "do_center_crop": True,
        "do_convert_rgb": spec.in_channels == 3,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(spec.mean),
        "image_processor_type": "BitImageProcessor",
        "image_std": list(spec.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": spec.resize_size_px},
    }
    return {CONFIG_FILE: config, PREPROCESSOR_FILE: preprocessor}
