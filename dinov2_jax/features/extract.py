"""Features of all images of a source, to disk: decoded ahead, computed in batches, resumable.

Work is divided by shards, ranges of the source's images; no batch spans two, so a shard is the
same whichever process makes it, and whatever happened before.
"""

import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from dinov2_jax.data.records import Source
from dinov2_jax.data.sources import open_source
from dinov2_jax.features import file_store
from dinov2_jax.features.file_store import FileStore
from dinov2_jax.features.fill import Report, fill_store
from dinov2_jax.features.folder_store import FolderStore
from dinov2_jax.features.index import make_index, row_bytes
from dinov2_jax.features.outputs import DTYPES, make_compute, parse_what
from dinov2_jax.features.reader import Reader
from dinov2_jax.features.table import StoreError
from dinov2_jax.model import Model, load
from dinov2_jax.preprocess import check_sizes

# Of files that a user may hope for; anything else is a folder.
_OTHER_SUFFIXES = (".npy", ".parquet", ".csv", ".pt", ".pth", ".h5", ".hdf5")


def extract(
    model: Model | str | os.PathLike,
    source: Source | str | os.PathLike,
    out: str | os.PathLike,
    *,
    what: str | Sequence[str] = "cls",
    dtype: str = "float32",
    norm: bool = True,
    resize_size_px: int | None = None,
    crop_size_px: int | None = None,
    crop: bool = True,
    per_device_batch_size: int = 32,
    num_threads: int | None = None,
    shard_size: int = 512,
    max_bad_fraction: float = 0.01,
    process_index: int | None = None,
    process_count: int | None = None,
    quiet: bool = False,
) -> Report:
    """Writes features of every image of a source; called again, goes on where it was.

    An image that cannot be read is named and left out; the ids of the others stay those of the
    source.

    Args:
      model: what to compute with, or what `dinov2_jax.load` takes.
      source: images, or what `data.sources.open_source` takes.
      out: a folder; or for a small set, held in memory, a `.npz` or `.safetensors` file.
      what: see `outputs.parse_what`.
      dtype: of the arrays on disk: "float32", "float16" or "bfloat16".
      norm: whether "layers" and "layers_patches" are after the final normalisation.
      resize_size_px, crop_size_px, crop: see `Model.preprocess`. Without a crop all images must
        end up in one size.
      per_device_batch_size: images at once on each device of this host.
      num_threads: that decode; None: one a core, at most 16.
      shard_size: images a shard; a killed run loses one at most.
      max_bad_fraction: share of bad images above which it stops, if there is more than one; 0:
        at the first.
      process_index, process_count: this process makes every `process_count`-th shard. None: those
        of `jax.distributed` where the caller has initialised it, else 0 and 1.
      quiet: says nothing.

    Raises:
      ValueError: an argument that cannot be; `out` holds something else; features that are not
        finite; too many bad images; or images of several sizes without a crop.
      OSError: `out` cannot be written. Shards that are complete stay.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{dtype=} must be one of {tuple(DTYPES)}; choose one of them")
    numbers = {
        "per_device_batch_size": per_device_batch_size,
        "shard_size": shard_size,
        "num_threads": num_threads,
    }
    for name, size in numbers.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1; leave it out for its default")
    process = (
        jax.process_index() if process_index is None else process_index,
        jax.process_count() if process_count is None else process_count,
    )
    out = _check_target(out, *process)
    model = model if isinstance(model, Model) else load(model)
    source = source if isinstance(source, Source) else open_source(os.fspath(source))
    spec = model.spec
    outputs = parse_what(what, depth=spec.depth, num_register_tokens=spec.num_register_tokens)
    sizes = model.sizes(resize_size_px=resize_size_px, crop_size_px=crop_size_px, crop=crop)
    check_sizes(sizes["resize_size_px"], sizes["crop_size_px"])
    reader = Reader(source, sizes, num_channels=spec.in_channels)
    compute = make_compute(model, outputs, norm=norm, dtype=DTYPES[dtype])
    one_image = jax.ShapeDtypeStruct((1, *reader.image_shape), np.float32)
    is_file = out.suffix in file_store.SUFFIXES
    index = make_index(
        model=model,
        source=source,
        outputs=outputs,
        norm=norm,
        sizes=sizes,
        image_shape=reader.image_shape,
        arrays=jax.eval_shape(compute, model.params, one_image),
        shard_size=0 if is_file else shard_size,
    )
    size = row_bytes(index)
    about = [
        source.describe(),
        spec.describe(),
        f"{', '.join(index['arrays'])} as {dtype}: {size:,} bytes an image, "
        f"{size * len(source) / 1e6:,.1f} MB in all, in {out}",
    ]
    with FileStore(out, index) if is_file else FolderStore(out, index, process=process) as store:
        return fill_store(
            store,
            index,
            source=source,
            reader=reader,
            model=model,
            compute=compute,
            per_device_batch_size=per_device_batch_size,
            num_threads=num_threads or min(os.cpu_count() or 1, 16),
            max_bad_fraction=max_bad_fraction,
            process=process,
            about=about,
            quiet=quiet,
        )


def _check_target(out: str | os.PathLike, process_index: int, process_count: int) -> pathlib.Path:
    if "://" in os.fspath(out):
        raise StoreError(f"{out} must be on a file system: object stores cannot rename folders")
    out = pathlib.Path(out).expanduser()
    if out.suffix in _OTHER_SUFFIXES:
        raise StoreError(f"{out} must be a folder, or a file {' or '.join(file_store.SUFFIXES)}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=} must lie between 0 and {process_count=} - 1")
    if process_count > 1 and out.suffix in file_store.SUFFIXES:
        raise StoreError(f"{out} is one file, which one process writes; choose a folder")
    return out
