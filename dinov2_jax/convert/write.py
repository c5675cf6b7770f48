"""Writing a model in any format, whole or not at all, and saying what the format cannot hold.

In: the model's record and its parameters. Out: a file or a folder that appears by a rename.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov2_jax.beside import written_beside
from dinov2_jax.convert import huggingface
from dinov2_jax.convert.lazy import Arrays
from dinov2_jax.convert.orbax_dir import PARAMS, write_orbax
from dinov2_jax.convert.read import Source, recognise
from dinov2_jax.convert.safetensors_file import write_safetensors
from dinov2_jax.convert.spec import METADATA_KEY, SPEC_FILE, ModelSpec
from dinov2_jax.convert.state_dict import load, to_reference
from dinov2_jax.convert.timm import to_timm
from dinov2_jax.convert.torch_file import write_torch

FORMATS = ("orbax", "safetensors", "reference", "hf", "timm")
TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def write_model(
    path: str | os.PathLike,
    spec: ModelSpec,
    params: Mapping[str, Any],
    *,
    format: str = "orbax",
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    block_chunks: int = 0,
) -> list[str]:
    """Writes a model.

    Args:
      path: the target: a folder for "orbax" and "hf", else a file (timm: safetensors, or `.pth`).
      spec: the model's record; it goes into every format.
      params: parameters of the backbone, or {"backbone": .., "dino_head": .., ..}.
      format: one of `FORMATS`.
      overwrite: whether a target that is there may be replaced.
      metadata: more facts for the header of a safetensors file.
      block_chunks: "reference" alone: name blocks as its training does with this many chunks.

    Returns:
      What the format does not hold, in words.

    Raises:
      FileExistsError: the target is there.
      ValueError: the format cannot express the model, or parameters do not fit the record.
      OSError: the target cannot be written; nothing is left of it then.
    """
    flat = to_reference(params)
    source = recognise(flat, known=dataclasses.asdict(spec))
    if source.spec != spec:
        raise ValueError(f"params are those of {source.spec}, but {spec=} was given")
    source = dataclasses.replace(source, metadata=metadata or {})
    return write_source(path, source, format=format, overwrite=overwrite, block_chunks=block_chunks)


def write_source(
    path: str | os.PathLike,
    source: Source,
    *,
    format: str = "orbax",
    overwrite: bool = False,
    block_chunks: int = 0,
) -> list[str]:
    """`write_model` for a model that was read by `read_source`: arrays pass one by one."""
    path = pathlib.Path(path)
    if format not in FORMATS:
        raise ValueError(f"{format=} must be one of {FORMATS}; choose one of them")
    if block_chunks and format != "reference":
        raise ValueError(f"{block_chunks=} needs format='reference', not {format!r}")
    check_target(path, format, overwrite)
    facts = {METADATA_KEY: source.spec.to_json()}
    header = {**source.metadata, **facts}
    lost = [] if format in ("safetensors", "hf") else _lost_facts(source.metadata)
    with written_beside(path) as beside:
        if format == "orbax":
            write_orbax(beside, load(source.params), facts)
        elif format == "safetensors":
            write_safetensors(beside, _unprefixed(source.flat), header)
        elif format == "reference":
            flat = _chunked(source.flat, source.spec.depth, block_chunks)
            key = "teacher" if set(source.params) & {"dino_head", "ibot_head"} else None
            write_torch(beside, _unprefixed(flat), facts, key=key)
        elif format == "hf":
            lost += _lost_heads(source, keep=("linear_head",))
            _write_huggingface(beside, source, header)
        else:
            lost += _lost_heads(source, keep=())
            flat, dropped = to_timm(_unprefixed(_select(source.flat, ("backbone",))))
            lost += dropped
            is_torch = path.suffix in TORCH_SUFFIXES
            (write_torch if is_torch else write_safetensors)(beside, flat, facts)
    return lost


def backbone_only(source: Source) -> Source:
    """The source without its heads."""
    return dataclasses.replace(
        source,
        params={"backbone": source.params["backbone"]},
        flat=_select(source.flat, ("backbone",)),
    )


def resize_positions(source: Source, grid: tuple[int, int]) -> Source:
    """The source with its position table resized, once and for all, by its own rule."""
    from dinov2_jax.models.pos_embed import interpolate_pos_embed

    table = source.params["backbone"]["pos_embed"]
    resized = np.asarray(
        interpolate_pos_embed(
            np.asarray(table),
            stored_grid=source.spec.pos_embed_grid,
            grid=grid,
            interpolation=source.spec.interpolation,
        )
    )
    return dataclasses.replace(
        source,
        spec=dataclasses.replace(source.spec, pos_embed_grid=grid),
        params=source.params | {"backbone": source.params["backbone"] | {"pos_embed": resized}},
        flat=source.flat | {"backbone.pos_embed": resized},
    )


def check_target(path: pathlib.Path, format: str, overwrite: bool) -> None:
    """Raises FileNotFoundError or FileExistsError where a target of a format cannot be put."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.parent} must be a folder; create it")
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} is there already; --overwrite replaces it")
    is_ours = (path / PARAMS).is_dir() and (path / SPEC_FILE).exists()
    is_hf = (path / huggingface.WEIGHTS_FILE).exists() and (path / huggingface.CONFIG_FILE).exists()
    if path.is_dir() and not (is_ours or is_hf):
        raise FileExistsError(
            f"{path} is a folder of something else than one model, and is not replaced; choose "
            "another target"
        )
    if path.is_dir() != (format in ("orbax", "hf")):
        raise FileExistsError(f"{path} is of another kind than {format=} writes; remove it first")


def _select(flat: Mapping[str, Arrays], modules: Sequence[str]) -> dict[str, Arrays]:
    return {name: array for name, array in flat.items() if name.partition(".")[0] in modules}


def _unprefixed(flat: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """A backbone alone has no prefix in any format."""
    if set(_select(flat, ("backbone",))) != set(flat):
        return dict(flat)
    return {name.removeprefix("backbone."): array for name, array in flat.items()}


def _chunked(flat: Mapping[str, Arrays], depth: int, chunks: int) -> dict[str, Arrays]:
    """`backbone.blocks.{i}` as `backbone.blocks.{chunk}.{i}`, as the reference cuts them."""
    if not chunks:
        return dict(flat)
    if not 0 < chunks <= depth:
        raise ValueError(f"block_chunks={chunks} must be in 1..{depth}, the number of blocks")
    size = depth // chunks

    def rename(name: str) -> str:
        start, found, rest = name.partition("backbone.blocks.")
        if start or not found:
            return name
        return f"{found}{int(rest.partition('.')[0]) // size}.{rest}"

    return {rename(name): array for name, array in flat.items()}


def _write_huggingface(folder: pathlib.Path, source: Source, header: Mapping[str, str]) -> None:
    flat = _select(source.flat, ("backbone", "linear_head"))
    classes = flat["linear_head.bias"].shape[0] if "linear_head.bias" in flat else None
    if classes and flat["linear_head.weight"].shape[1] != 2 * source.spec.embed_dim:
        raise ValueError(
            "the classifier must be on the class token and the mean patch of the last layer, as "
            "transformers' is; write it without, --backbone-only"
        )
    configs = huggingface.make_configs(source.spec, num_classes=classes)
    folder.mkdir()
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    # transformers refuses a file that does not say "pt".
    header = {**header, "format": "pt"}
    write_safetensors(folder / huggingface.WEIGHTS_FILE, huggingface.to_huggingface(flat), header)


def _lost_heads(source: Source, *, keep: Sequence[str]) -> list[str]:
    heads = sorted(set(source.params) - {"backbone", *keep})
    return [f"{' and '.join(heads)} (the format has no place for them)"] if heads else []


def _lost_facts(metadata: Mapping[str, str]) -> list[str]:
    return [f"the file's facts {sorted(metadata)}"] if metadata else []
