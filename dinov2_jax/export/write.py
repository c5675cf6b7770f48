"""Exporting a model: written beside its place, read again, compared, and only then put there.

In: any source that `dinov2_jax.load` takes. Out: a file for another runtime, whole or not at all.
"""

import json
import os
import pathlib
import shutil

import jax
import numpy as np

from dinov2_jax import hub
from dinov2_jax.convert.read import Source, read_source
from dinov2_jax.convert.spec import METADATA_KEY
from dinov2_jax.convert.state_dict import load
from dinov2_jax.convert.write import backbone_only, check_target, resize_positions, write_source
from dinov2_jax.export.check import Run, check, outputs_by_name
from dinov2_jax.export.onnx_graph import require_onnx, write_onnx
from dinov2_jax.export.stablehlo import write_stablehlo
from dinov2_jax.model import Model

# And what the name of a file that may lie beside the target ends in.
FORMATS = {"stablehlo": [".json"], "onnx": [".data"], "safetensors": []}
INPUT_KEY = "dinov2_jax.input"


def export_model(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    format: str | None = None,
    size: tuple[int, int] | None = None,
    tree: str = "teacher",
    num_heads: int | None = None,
    interpolation: str | None = None,
    overwrite: bool = False,
) -> dict[str, float]:
    """Exports the backbone of a model, float32, for any batch of images of one size.

    Args:
      source: what `dinov2_jax.load` takes.
      target: the file. Beside a StableHLO file appears `{target}.json`; beside an ONNX file of
        more than 2 GB, `{target}.data`.
      format: "stablehlo", "onnx" or "safetensors" (see `dinov2_jax.convert`: any size, heads are
        kept); None: the target's suffix.
      size: height and width of the images in pixels; None: the model's crop. The position table
        becomes that of this size.
      tree, num_heads, interpolation: see `dinov2_jax.load`.
      overwrite: whether a target that is there may be replaced.

    Returns:
      Output ("cls", "patches", and "registers" where there are any) -> the largest difference
      between the written file and the source, over the largest value.

    Raises:
      ExportError: the file differs by more than `check.BOUND`; nothing was written.
      FileNotFoundError, FileExistsError, ValueError: wrong source, target or size.
      ModuleNotFoundError: "onnx" without its packages.
    """
    target = pathlib.Path(target)
    format = format or target.suffix.removeprefix(".")
    if format not in FORMATS:
        raise ValueError(
            f"{format=} must be one of {tuple(FORMATS)}; give --format, or a target that ends so"
        )
    if format == "onnx":
        require_onnx()
    for end in ("", *FORMATS[format]):
        check_target(target.with_name(f"{target.name}{end}"), format, overwrite)
    options = dict(tree=tree, num_heads=num_heads, interpolation=interpolation)
    whole = read_source(hub.find(source), **options)
    height, width = _check_size(whole, format, size)
    written = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(written, ignore_errors=True)  # of a run that was killed
    written.mkdir()
    try:
        # The reference of the check: exact float32, whatever accelerator there is.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            run = _write(written / target.name, whole, format, height, width)
            differences = check(run, _float32_model(whole), height=height, width=width)
        # The target comes last: where it is, all is.
        for path in sorted(written.iterdir(), key=lambda path: path.name == target.name):
            os.replace(path, target.with_name(path.name))
    finally:
        shutil.rmtree(written)
    return differences


def _check_size(source: Source, format: str, size: tuple[int, int] | None) -> tuple[int, int]:
    if format == "safetensors" and size:
        raise ValueError(
            "safetensors holds a model of any image size; leave --size out, or choose another "
            "--format"
        )
    height, width = size or (source.spec.crop_size_px, source.spec.crop_size_px)
    p = source.spec.patch_size
    if min(height, width) < p or height % p or width % p:
        near_height, near_width = (max(round(side / p), 1) * p for side in (height, width))
        raise ValueError(
            f"size={height}x{width} must be multiples of patch_size={p}; "
            f"choose {near_height}x{near_width}"
        )
    return height, width


def _write(path: pathlib.Path, source: Source, format: str, height: int, width: int) -> Run:
    """Writes one format, and returns what was written as a function of images."""
    if format == "safetensors":
        write_source(path, source, format=format)
        model = _float32_model(read_source(path))
        return lambda images: outputs_by_name(model(images))
    p = source.spec.patch_size
    baked = resize_positions(backbone_only(source), (height // p, width // p))
    model = _float32_model(baked)
    facts = {
        METADATA_KEY: model.spec.to_json(),
        INPUT_KEY: json.dumps(
            {
                "name": "images",
                "layout": "batch, height, width, channels",
                "height_px": height,
                "width_px": width,
                "mean": model.spec.mean,
                "std": model.spec.std,
                "pixels": "in [0, 1], then (pixel - mean) / std",
            }
        ),
    }
    write = {"onnx": write_onnx, "stablehlo": write_stablehlo}[format]
    return write(path, model, facts, height=height, width=width)


def _float32_model(source: Source) -> Model:
    """The backbone with plain operators and float32 parameters, whatever the file has."""
    params = jax.tree.map(np.float32, load(source.params["backbone"]))
    return Model(source.spec, params, attention="xla")
