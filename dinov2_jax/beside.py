"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def written_beside(path: str | os.PathLike, *, mark: str = "tmp") -> Iterator[pathlib.Path]:
    """Gives a name beside `path`; what is there at the end takes the place of `path`.

    Nothing is there at the beginning, and nothing stays if the caller fails: `path` is then as it
    was. A killed caller leaves `.NAME.MARK`, which the next one removes.

    Args:
      path: of a file or folder, on a disk; its folder must exist.
      mark: callers that may write the same `path` at the same time need different ones.
    """
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.{mark}")
    _remove(beside)
    try:
        yield beside
        if beside.is_file():
            with open(beside, "rb") as file:
                os.fsync(file.fileno())  # or a power cut could leave the name without its content
        _replace(beside, path)
    finally:
        _remove(beside)


def _replace(beside: pathlib.Path, path: pathlib.Path) -> None:
    if not path.is_dir():
        os.replace(beside, path)
        return
    old = path.with_name(f".{path.name}.old")  # a folder takes the place of an empty one only
    _remove(old)
    os.replace(path, old)
    os.replace(beside, path)
    _remove(old)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
