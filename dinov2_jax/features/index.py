"""The index: what features are of, and how they were made; it lies beside them as JSON.

A run that goes on must agree with it in all but speed, or it would mix features of two kinds.
"""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dinov2_jax.config import flatten_config
from dinov2_jax.convert.safetensors_file import open_safetensors
from dinov2_jax.data.records import Source
from dinov2_jax.features.outputs import DTYPES, Outputs
from dinov2_jax.features.table import StoreError
from dinov2_jax.model import Model

INDEX_FILE = "index.json"
METADATA_KEY = "dinov2_jax.features"  # of the index in a safetensors file
FORMAT = "dinov2_jax.features 1"
# What a run that goes on need not agree on: added at the end, or for people (`photos/` is
# `photos`; other images have other names).
_FREE = ("rows", "bad_images", "model.name", "source.path")
_NUM_SAMPLED_NAMES = 256
_MAX_SHOWN = 60  # characters of a value


def make_index(
    *,
    model: Model,
    source: Source,
    outputs: Outputs,
    norm: bool,
    sizes: Mapping[str, int | None],
    image_shape: tuple[int, ...],
    arrays: Mapping[str, jax.ShapeDtypeStruct],
    shard_size: int,
) -> dict[str, Any]:
    """The index of features that are about to be computed, JSON throughout.

    Args:
      model: the network.
      source: the images.
      outputs, norm: see `outputs.make_compute`.
      sizes: see `dinov2_jax.preprocess.resize`.
      image_shape: of every image, as the network takes it.
      arrays: what `make_compute` gives for a batch of one.
      shard_size: images a shard; 0: all in one file.
    """
    index = {
        "format": FORMAT,
        "what": str(outputs),
        "norm": norm,
        "arrays": {
            name: {"dtype": x.dtype.name, "shape": x.shape[1:]} for name, x in arrays.items()
        },
        "images": len(source),
        "shard_size": shard_size,
        "num_shards": -(-len(source) // (shard_size or len(source))),
        "source": {
            "path": source.path,
            "kind": source.kind,
            "names_sha256": names_sha256(source),
        },
        "label_names": source.label_names,
        "image_shape": image_shape,
        "resize_size_px": sizes["resize_size_px"],
        "crop_size_px": sizes["crop_size_px"],
        "uneven": model.uneven,
        "compute_dtype": model.dtype.name,
        "model": {
            "name": model.name,
            "weights_sha256": model.weights_sha256,
            "variant": model.spec.variant,
            **dataclasses.asdict(model.spec),
        },
    }
    return json.loads(json.dumps(index))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What would be mixed, such as "what: 'cls' -> 'cls,mean'"."""
    old, new = (flatten_config(index) for index in (old, new))
    shown = {name: (_show(old, name), _show(new, name)) for name in sorted({*old, *new})}
    return [
        f"{name}: {before} -> {after}"
        for name, (before, after) in shown.items()
        if name not in _FREE and old.get(name) != new.get(name)
    ]


def _show(flat: Mapping[str, Any], name: str) -> str:
    text = repr(flat[name]) if name in flat else "(absent)"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}.."


def check_same(out: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises StoreError, naming the differences, where a run must not go on."""
    found = differences(old, new)
    if found:
        raise StoreError(
            f"{out} holds features made otherwise: {'; '.join(found)}; set that back, or choose "
            "another target"
        )


def read_index(out: pathlib.Path) -> dict[str, Any]:
    """The index of a folder or a file.

    Raises:
      StoreError: there is none, or it is damaged.
    """
    try:
        if out.is_dir():
            text = (out / INDEX_FILE).read_text()
        elif out.suffix == ".safetensors":
            text = open_safetensors(out)[1][METADATA_KEY]
        else:
            with open(out, "rb") as opened, np.load(opened) as file:
                text = str(file["index"])
        index = json.loads(text)
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']!r} is not {FORMAT!r}")
        return index
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{out} does not hold features of dinov2_jax ({str(error) or type(error).__name__}); "
            "choose another, or write it anew"
        ) from error


def format_index(index: Mapping[str, Any]) -> str:
    """For people too: one fact a line."""
    facts = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in index.items())
    return "{\n" + ",\n".join(facts) + "\n}\n"


def shard_path(out: pathlib.Path, index: Mapping[str, Any], number: int) -> pathlib.Path:
    """Folder of a shard."""
    return out / f"shard-{number:05d}-of-{index['num_shards']:05d}"


def row_bytes(index: Mapping[str, Any]) -> int:
    """Bytes of one image's arrays."""
    return sum(
        int(np.prod(x["shape"])) * DTYPES[x["dtype"]].itemsize for x in index["arrays"].values()
    )


def names_sha256(source: Source) -> str:
    """Of a few hundred names over the whole source: images that came, went or moved shift them.

    Not of all: where a record must be read for its name, that would read everything.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, _NUM_SAMPLED_NAMES).astype(int))
    names = "\0".join(source.name(i) for i in chosen.tolist())
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
