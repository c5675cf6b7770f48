"""Reading any model: what a path holds is recognised, its names become the reference's.

In: a path. Out: the model's record and its parameters, all checked before any is read: names
without a rule, missing and double parameters and wrong shapes come in one error.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dinov2_jax.convert import huggingface, orbax_dir, timm
from dinov2_jax.convert.heads import head_shapes
from dinov2_jax.convert.lazy import Arrays
from dinov2_jax.convert.rules import MODULES
from dinov2_jax.convert.safetensors_file import open_safetensors
from dinov2_jax.convert.spec import METADATA_KEY, ModelSpec, infer_spec
from dinov2_jax.convert.state_dict import (
    ConversionError,
    flatten_chunks,
    is_bare_backbone,
    lazy_from_reference,
    load,
    nest,
    to_reference,
)
from dinov2_jax.convert.torch_file import read_torch


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that was recognised and fits; its numbers are not read yet.

    Attributes:
      spec: what it is.
      params: our tree, {"backbone": .., and any of "dino_head", "ibot_head", "linear_head"}, of
        lazy arrays.
      flat: the same under the reference's names with prefixes, blocks not chunked.
      format: what was recognised, in words.
      notes: what the reader should know, a line each.
      metadata: the file's own facts, the model's record left out.
    """

    spec: ModelSpec
    params: dict[str, Any]
    flat: dict[str, Arrays]
    format: str
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_model(
    path: str | os.PathLike,
    *,
    tree: str = "teacher",
    with_heads: bool = False,
    num_heads: int | None = None,
    interpolation: str | None = None,
) -> tuple[ModelSpec, dict[str, Any]]:
    """Reads a model of any format as `(spec, parameters)`; `spec.build()` is its module.

    Args:
      path: a file or folder, see `read_source`.
      tree: "teacher" or "student": of our checkpoints, which have both.
      with_heads: whether to return {"backbone": .., "dino_head": .., ..} with every head that
        the file has, or the backbone's parameters alone.
      num_heads: attention heads; None: what the file says, or width / 64.
      interpolation: how positions are resized: "reference", "huggingface" or "timm", or a rule's
        name; None: what the file says, or "reference".

    Returns:
      The record, and nested numpy arrays in the types of the file.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is not recognised, damaged, or does not fit (`ConversionError`: all reasons).
      ModuleNotFoundError: a `.pth` without PyTorch.
    """
    source = read_source(path, tree=tree, num_heads=num_heads, interpolation=interpolation)
    return source.spec, load(source.params if with_heads else source.params["backbone"])


def read_source(
    path: str | os.PathLike,
    *,
    tree: str = "teacher",
    num_heads: int | None = None,
    interpolation: str | None = None,
) -> Source:
    """Recognises and checks a model; arguments and errors as `read_model`.

    Recognised: `.pth` (the reference's backbones and training checkpoints, timm, transformers),
    `.safetensors` (ours, transformers', timm's), folders of transformers, and our Orbax
    checkpoints: a workdir, one of its steps, or parameters alone.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give a file or folder that exists")
    if path.is_dir():
        if orbax_dir.is_orbax(path):
            params, metadata, what = orbax_dir.read_orbax(path, tree=tree)
            flat, kind = to_reference(params), f"Orbax, {what}"
        else:
            flat, metadata = _read_folder(path)
            kind = "folder"
    elif path.name.endswith(".safetensors"):
        flat, metadata = open_safetensors(path)
        kind = "safetensors"
    else:
        flat, metadata = read_torch(path)
        kind = "PyTorch"
    known = {}
    if METADATA_KEY in metadata:
        known = dataclasses.asdict(ModelSpec.from_json(metadata[METADATA_KEY]))
    elif huggingface.is_huggingface(flat):
        known = huggingface.read_facts(path if path.is_dir() else path.parent)
    source = recognise(flat, known=known, num_heads=num_heads, interpolation=interpolation)
    return dataclasses.replace(
        source,
        format=f"{kind}, {source.format}" if not kind.startswith("Orbax") else kind,
        metadata={
            key: text for key, text in metadata.items() if key not in (METADATA_KEY, "format")
        },
    )


def recognise(
    flat: Mapping[str, Arrays],
    *,
    known: Mapping[str, Any] | None = None,
    num_heads: int | None = None,
    interpolation: str | None = None,
) -> Source:
    """Recognises names, and checks everything without reading a number.

    Args:
      flat: name -> array, in the names of the reference, transformers or timm.
      known: what the file says of itself, attributes of `ModelSpec`.
      num_heads, interpolation: as in `read_model`.

    Raises:
      ConversionError: lists all that does not fit.
    """
    problems, notes, known = [], [], dict(known or {})
    if huggingface.is_huggingface(flat):
        what = "Hugging Face names"
        flat, problems = huggingface.from_huggingface(flat)
    elif "cls_token" in flat and "mask_token" not in flat:
        what = "timm names"
        flat = timm.from_timm(flat)
        notes.append("the file has no mask token (timm has none): it is zero here")
    else:
        is_bare = is_bare_backbone(flat)
        is_chunked = any(flatten_chunks(n.removeprefix("backbone.")) != n.removeprefix("backbone.")
                         for n in flat)  # fmt: skip
        what = "the reference's names, " + (
            "a backbone" if is_bare else "with prefixes"
        ) + (", blocks in chunks" if is_chunked else "")  # fmt: skip
    if is_bare_backbone(flat):
        flat = {f"backbone.{name}": array for name, array in flat.items()}
    shapes = {name: tuple(array.shape) for name, array in flat.items()}
    named = {module: {} for module in MODULES}
    for name, shape in shapes.items():
        module, _, rest = name.partition(".")
        if module in named:
            named[module][flatten_chunks(rest) if module == "backbone" else rest] = shape
    try:
        spec = infer_spec(
            named["backbone"], known=known, num_heads=num_heads, interpolation=interpolation
        )
    except ValueError as error:
        raise ConversionError("cannot read this model", [*problems, str(error)]) from error
    template = None
    if spec is not None:
        template = {"backbone": _template(spec.shapes())}
        for module, found in named.items():
            if module != "backbone" and found:
                template[module] = _template(head_shapes(module, found, spec.embed_dim))
        if not known.get("mean"):
            notes.append(f"the file does not say mean and std: {spec.mean}, {spec.std} are assumed")
        if num_heads is None and not known.get("num_heads") and spec.variant == "custom":
            notes.append(
                f"the file does not say how many heads: {spec.num_heads}, width / 64, is assumed; "
                "--num-heads says otherwise"
            )
    params = lazy_from_reference(flat, template=template, problems=problems)
    if spec is None:
        raise ConversionError(
            "cannot read this model",
            ["it has no backbone; the released task heads are read by read_task_head"],
        )
    flat = {
        f"backbone.{flatten_chunks(name.removeprefix('backbone.'))}"
        if name.startswith("backbone.")
        else name: array
        for name, array in flat.items()
    }
    return Source(spec, params, flat, what, tuple(notes))


class _Shape(NamedTuple):
    """A leaf of a template."""

    shape: tuple[int, ...]


def _template(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    return nest({path: _Shape(shape) for path, shape in shapes.items()})


def _read_folder(path: pathlib.Path) -> tuple[dict[str, Arrays], dict[str, str]]:
    """The weights of a folder as transformers writes it, in one file or in several."""
    index = path / f"{huggingface.WEIGHTS_FILE}.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        parts = [open_safetensors(path / name) for name in files]
        return {k: v for flat, _ in parts for k, v in flat.items()}, {}
    if (path / huggingface.WEIGHTS_FILE).exists():
        return open_safetensors(path / huggingface.WEIGHTS_FILE)
    if (path / "pytorch_model.bin").exists():
        return read_torch(path / "pytorch_model.bin")
    raise ValueError(
        f"{path} must be a run's workdir, a checkpoint, or a folder of transformers with "
        f"{huggingface.WEIGHTS_FILE}; it is none of them"
    )
