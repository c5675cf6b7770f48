"""The door to all kinds of data: a path in, a `Source` out. Numpy only."""

import os
import re

from dinov2_jax.data.array_record import ArrayRecordSource
from dinov2_jax.data.files import DISK, Disk, Store
from dinov2_jax.data.folder import open_files, open_folder, open_list
from dinov2_jax.data.hub import HuggingFaceSource, TfdsSource
from dinov2_jax.data.image_ops import IMAGE_SUFFIXES
from dinov2_jax.data.mixture import Mixture
from dinov2_jax.data.photos import PhotosSource
from dinov2_jax.data.records import BadImage, DataError, Record, Source
from dinov2_jax.data.tar import TarSource
from dinov2_jax.faults import PassingFault, refusal

__all__ = ["BadImage", "DataError", "Record", "Source", "open_mixture", "open_source"]

_KINDS = (
    "a folder, image files, a .txt list, tar shards ('shards/*.tar'), ArrayRecord files "
    "('x.array_record*'), 'hf:name:split', 'tfds:name:split' or 'photos:'"
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(path: str) -> Source:
    """Opens images wherever they are.

    Args:
      path: a folder (searched at any depth), a .txt list, image files, tar shards or ArrayRecord
        files (a glob or a range such as "{000..127}" may name several), "hf:name[/config]:split",
        "tfds:name:split", "photos:", "photos:left" or "photos:right". All but ArrayRecord files
        may also be at a URL that fsspec knows, "gs://bucket/folder" for example.

    Returns:
      A source with at least one record.

    Raises:
      DataError: nothing there, nothing usable there, or a package is missing.
      PassingFault: the store cannot be reached now.
    """
    if not path:
        raise DataError(f"the path is empty; it must be {_KINDS}")
    if path.startswith("photos:"):
        return PhotosSource(path.removeprefix("photos:"))
    if path.startswith("hf:"):
        return HuggingFaceSource(path.removeprefix("hf:"))
    if path.startswith("tfds:"):
        return TfdsSource(path.removeprefix("tfds:"))
    if "://" not in path:
        return _open(os.path.expanduser(path), DISK)
    try:
        return _open(path.rstrip("/"), Store(path))
    except PassingFault:  # says what it is
        raise
    except OSError as error:
        text = f"{path} cannot be read ({error.strerror}); check its access"
        raise refusal(DataError, text, cause=error) from error


def _open(path: str, files: Disk | Store) -> Source:
    if files.is_folder(path):
        return open_folder(path, files)
    patterns = _expand_range(path)
    if files.is_file(path):  # meant as it is, whatever brackets its name has
        found = [path]
    elif len(patterns) == 1:
        found = files.glob(path)
    else:  # with those that are missing: the source rejects them by name
        found = patterns if any(map(files.glob, patterns)) else []
    if not found:
        raise DataError(f"nothing found at '{path}'; it must be {_KINDS}")
    names = [os.path.basename(file) for file in found]
    if path.endswith(".txt") and len(found) == 1:
        return open_list(found[0], files)
    if all(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return open_files(path, found, files)
    if all(".array_record" in name or ".arrayrecord" in name for name in names):
        if isinstance(files, Store):
            raise DataError(
                f"{path}: ArrayRecord files are read from disks only; copy them to every host, or "
                "use tar shards"
            )
        return ArrayRecordSource(path, found)
    if all(name.endswith(".tar") or ".tar." in name or name.endswith(".tgz") for name in names):
        return TarSource(path, found, files)
    raise DataError(
        f"{found[0]} at '{path}' is of no known kind (or kinds are mixed); it must be {_KINDS}"
    )


def open_mixture(mixture: tuple[tuple[str, float], ...]) -> Mixture:
    """Opens several sources that take turns by weight.

    Args:
      mixture: (path, weight) pairs; weights are positive and need not sum to 1.

    Raises:
      DataError, PassingFault: as `open_source`; DataError: a weight that is not positive.
    """
    return Mixture([open_source(path) for path, _ in mixture], [weight for _, weight in mixture])


def _expand_range(path: str) -> list[str]:
    match = _RANGE.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    return [path[: match.start()] + number + path[match.end() :] for number in numbers]
