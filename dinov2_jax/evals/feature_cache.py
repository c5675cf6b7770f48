"""Features on disk, computed once for every (weights, images, tokens, size), shared by tasks."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from dinov2_jax import distributed
from dinov2_jax.data.records import Source
from dinov2_jax.data.sources import open_source
from dinov2_jax.features.extract import extract
from dinov2_jax.features.index import names_sha256, weights_sha256
from dinov2_jax.features.read import FeatureSet, read
from dinov2_jax.model import Model

_KEY_CHARACTERS = 12


def cached_features(
    model: Model,
    source: Source | str,
    cache: pathlib.Path,
    *,
    what: str = "cls",
    norm: bool = True,
    resize_size_px: int | None = None,
    crop_size_px: int | None = None,
    crop: bool = True,
    per_device_batch_size: int = 32,
    num_threads: int | None = None,
    quiet: bool = False,
) -> FeatureSet:
    """Features of every image of a source; what is in the cache is not computed again.

    Several processes share the work where the caller has initialised `jax.distributed`; `cache`
    is then a folder that all of them see.

    Args:
      model: frozen.
      source: images, or what `data.sources.open_source` takes.
      cache: the folder; each set of features has one of its own in it.
      what, norm, resize_size_px, crop_size_px, crop, per_device_batch_size, num_threads, quiet:
        see `features.extract`.

    Raises:
      ValueError, OSError: as `features.extract`.
    """
    source = source if isinstance(source, Source) else open_source(source)
    sizes = model.sizes(resize_size_px=resize_size_px, crop_size_px=crop_size_px, crop=crop)
    key = {
        "weights": weights_sha256(model.params),
        "model": dataclasses.asdict(model.spec),
        "dtype": model.dtype.name,
        "uneven": model.uneven,
        "source": [source.path, len(source), names_sha256(source)],
        "what": what,
        "norm": norm,
        "sizes": sizes,
    }
    folder = cache / _folder_name(source, what, key)
    extract(
        model,
        source,
        folder,
        what=what,
        norm=norm,
        resize_size_px=resize_size_px,
        crop_size_px=crop_size_px,
        crop=crop,
        per_device_batch_size=per_device_batch_size,
        num_threads=num_threads,
        quiet=quiet,
    )
    distributed.meet()
    return read(folder)


def _folder_name(source: Source, what: str, key: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    stem = "".join(c if c.isalnum() else "-" for c in pathlib.Path(source.path).name)[-40:]
    tokens = "".join(c if c.isalnum() else "-" for c in what)
    return f"{stem}_{tokens}_{digest[:_KEY_CHARACTERS]}"
