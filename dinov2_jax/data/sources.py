"""The door to all kinds of data: a path in, a `Source` out. Numpy only."""

import glob
import os
import re

from dinov2_jax.data.array_record import ArrayRecordSource
from dinov2_jax.data.folder import open_folder, open_list
from dinov2_jax.data.hub import HuggingFaceSource, TfdsSource
from dinov2_jax.data.mixture import Mixture
from dinov2_jax.data.photos import PhotosSource
from dinov2_jax.data.records import BadImage, DataError, Record, Source
from dinov2_jax.data.tar import TarSource

__all__ = ["BadImage", "DataError", "Record", "Source", "open_mixture", "open_source"]

_KINDS = (
    "a folder, a .txt list, tar shards ('shards/*.tar'), ArrayRecord files ('x.array_record*'), "
    "'hf:name:split', 'tfds:name:split' or 'photos:'"
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(path: str) -> Source:
    """Opens images wherever they are.

    Args:
      path: a folder (searched at any depth), a .txt list, tar shards or ArrayRecord files (a glob
        or a range such as "{000..127}" may name several), "hf:name[/config]:split",
        "tfds:name:split", "photos:", "photos:left" or "photos:right".

    Returns:
      A source with at least one record.

    Raises:
      DataError: nothing there, nothing usable there, or a package is missing.
    """
    if not path:
        raise DataError(f"the path is empty; it must be {_KINDS}")
    if path.startswith("photos:"):
        return PhotosSource(path.removeprefix("photos:"))
    if path.startswith("hf:"):
        return HuggingFaceSource(path.removeprefix("hf:"))
    if path.startswith("tfds:"):
        return TfdsSource(path.removeprefix("tfds:"))
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return open_folder(path)
    patterns = _expand_range(path)
    files = [file for pattern in patterns for file in sorted(glob.glob(pattern, recursive=True))]
    if files and len(patterns) > 1:
        files = patterns  # with those that are missing: the source rejects them by name
    if not files:
        raise DataError(f"nothing found at '{path}'; it must be {_KINDS}")
    names = [os.path.basename(file) for file in files]
    if path.endswith(".txt") and len(files) == 1:
        return open_list(files[0])
    if all(".array_record" in name or ".arrayrecord" in name for name in names):
        return ArrayRecordSource(path, files)
    if all(name.endswith(".tar") or ".tar." in name or name.endswith(".tgz") for name in names):
        return TarSource(path, files)
    raise DataError(
        f"{files[0]} at '{path}' is of no known kind (or kinds are mixed); it must be {_KINDS}"
    )


def open_mixture(mixture: tuple[tuple[str, float], ...]) -> Mixture:
    """Opens several sources that take turns by weight.

    Args:
      mixture: (path, weight) pairs; weights are positive and need not sum to 1.

    Raises:
      DataError: as `open_source`, or a weight that is not positive.
    """
    return Mixture([open_source(path) for path, _ in mixture], [weight for _, weight in mixture])


def _expand_range(path: str) -> list[str]:
    match = _RANGE.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    return [path[: match.start()] + number + path[match.end() :] for number in numbers]
