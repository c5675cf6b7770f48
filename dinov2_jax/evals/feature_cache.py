"""Features on disk, computed once for every (weights, images, tokens, size), shared by tasks."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dinov2_jax import distributed
from dinov2_jax.data.records import Source
from dinov2_jax.data.sources import open_source
from dinov2_jax.features.extract import extract
from dinov2_jax.features.index import names_sha256
from dinov2_jax.features.outputs import Outputs, parse_what
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

    Features that hold more than is asked for will do: those of a linear probe serve k-NN.

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
        "weights": model.weights_sha256,
        "model": dataclasses.asdict(model.spec),
        "dtype": model.dtype.name,
        "uneven": model.uneven,
        "source": [source.path, len(source), names_sha256(source)],
        "norm": norm,
        "sizes": sizes,
    }
    outputs = _outputs(what, key["model"])
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    digest = digest[:_KEY_CHARACTERS]
    more = _find_more(cache, digest, outputs)
    if more is not None:
        return more
    folder = cache / f"{_word(pathlib.Path(source.path).name)[-40:]}_{_word(what)}_{digest}"
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


def _find_more(cache: pathlib.Path, digest: str, outputs: Outputs) -> FeatureSet | None:
    """Complete features, of the same images by the same model, of these outputs and others."""
    for folder in sorted(cache.glob(f"*_{digest}")):
        try:
            found = read(folder)
        except ValueError:  # not complete
            continue
        kept = _outputs(found.index["what"], found.index["model"])
        if kept != outputs and kept.covers(outputs):
            return found
    return None


def _outputs(what: str, spec: Mapping[str, Any]) -> Outputs:
    sizes = {name: spec[name] for name in ("depth", "num_register_tokens")}
    return parse_what(what, **sizes)


def _word(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)
