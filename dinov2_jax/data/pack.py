"""Packs images into ArrayRecord files: python -m dinov2_jax.data.pack SOURCE OUT --shards N

SOURCE is anything that `data.path` takes; OUT/images.array_record-00000-of-0000N are written.
Names and labels come along (format: `array_record.py`); images are stored as they are.
"""

import argparse
import io
import os
import sys

import numpy as np
from PIL import Image

from dinov2_jax.beside import written_beside
from dinov2_jax.data.array_record import encode_record
from dinov2_jax.data.records import BadImage, DataError, Source
from dinov2_jax.data.sources import open_source
from dinov2_jax.faults import PassingFault


def pack(source: Source, out: str, *, num_shards: int) -> list[tuple[str, str]]:
    """Writes all records of a source, in order, into `num_shards` files of about equal count.

    Args:
      source: what to pack; arrays are stored as PNG.
      out: folder, made if missing; must not hold files of these names.
      num_shards: at least 1.

    Returns:
      (name, reason) of what was left out because it could not be read. Images are not decoded:
      a damaged one is stored, and met by the training pipeline.

    Raises:
      DataError: a file exists already, or more shards than images.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    if not 1 <= num_shards <= len(source):
        raise DataError(f"{num_shards=} must lie between 1 and the number of images {len(source)}")
    os.makedirs(out, exist_ok=True)
    files = [
        os.path.join(out, f"images.array_record-{i:05d}-of-{num_shards:05d}")
        for i in range(num_shards)
    ]
    existing = [file for file in files if os.path.exists(file)]
    if existing:
        raise DataError(f"{existing[0]} exists; remove it, or choose another folder")
    left_out = []
    bounds = np.linspace(0, len(source), num_shards + 1).astype(int)
    for shard, file in enumerate(files):
        with written_beside(file) as beside:
            # Groups of one: the reader then fetches a record without its neighbours.
            writer = ArrayRecordWriter(str(beside), "group_size:1,uncompressed")
            header = {"label_names": list(source.label_names)} if source.label_names else {}
            for index in range(bounds[shard], bounds[shard + 1]):
                try:
                    record = source[index]
                except BadImage as error:
                    left_out.append((source.name(index), str(error)))
                    continue
                metadata = {"name": record.name} | header
                if record.label is not None:
                    metadata["label"] = record.label
                writer.write(encode_record(_encoded(record.image), metadata))
                header = {}
            writer.close()
    return left_out


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="dinov2_jax.data.pack", description=__doc__)
    parser.add_argument("source", help="a folder, tar shards, a list, photos:, ...")
    parser.add_argument("out", help="folder for the ArrayRecord files")
    parser.add_argument("--shards", type=int, default=1, help="files to write (default 1)")
    options = parser.parse_args(arguments)
    try:
        source = open_source(options.source)
        print(source.describe())
        left_out = pack(source, options.out, num_shards=options.shards)
    except (DataError, PassingFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, reason in source.rejected + left_out:
        print(f"left out: {name}: {reason}")
    pattern = os.path.join(options.out, "images.array_record*")
    print(
        f"packed {len(source) - len(left_out):,} images; train with --config.data.path='{pattern}'"
    )
    return 0


def _encoded(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
