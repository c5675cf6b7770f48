"""Where files are read from: this machine's disks, or any URL that fsspec knows. Numpy only.

Both are pickled into the worker processes and read there by several threads. What cannot be read
is an OSError, whose `strerror` is the reason in a few words.
"""

import errno
import glob
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from dinov2_jax.data.records import DataError

# Between tries of what may be a passing fault; gcsfs tries six times by itself for each of ours.
PAUSES_SECS = (1.0, 4.0, 16.0)
_REFUSED = (400, 401, 403)


class Entry(NamedTuple):
    """What a folder of a store has in it."""

    name: str
    is_folder: bool
    size: int


class Disk:
    """Files of this machine."""

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def is_file(self, path: str) -> bool:
        return os.path.isfile(path)

    def is_there(self, path: str) -> bool:
        return os.path.exists(path)

    def glob(self, pattern: str) -> list[str]:
        """Paths that match, sorted."""
        return sorted(glob.glob(pattern, recursive=True))

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)


DISK = Disk()


class Store:
    """Objects at URLs of one kind, gs:// for example; nothing about them is remembered.

    A fault that may pass is tried again for some time; a missing object and a refusal are not.
    """

    def __init__(self, url: str):
        """Raises DataError where the package for this kind of URL is missing, or none is known."""
        kind = url.partition("://")[0]
        extra = "'dinov2_jax[gcs]'" if kind in ("gs", "gcs") else "fsspec, and what it asks for"
        try:
            import fsspec

            # What was listed is not kept: millions of names would be, and folders change.
            self._fs, _ = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise DataError(f"{url}: {error}; pip install {extra}") from error
        except ValueError as error:
            raise DataError(
                f"{url}: {error}; use a URL that fsspec knows, such as gs://"
            ) from error

    def is_folder(self, url: str) -> bool:
        return self._type(url) == "directory"

    def is_file(self, url: str) -> bool:
        return self._type(url) == "file"

    def is_there(self, url: str) -> bool:
        return self._type(url) is not None

    def glob(self, pattern: str) -> list[str]:
        """URLs that match, sorted."""
        found = self._patiently(self._fs.glob, pattern)
        return sorted(self._fs.unstrip_protocol(path) for path in found)

    def read(self, url: str) -> bytes:
        return self._patiently(self._fs.cat_file, url)

    def read_range(self, url: str, offset: int, size: int) -> bytes:
        return self._patiently(self._fs.cat_file, url, start=offset, end=offset + size)

    def write(self, url: str, content: bytes) -> None:
        self._patiently(self._fs.pipe_file, url, content)

    def list_folder(self, url: str) -> list[Entry]:
        """All that is directly in a folder, sorted by name."""
        entries = []
        for info in self._patiently(self._fs.ls, url, detail=True):
            path = info["name"].rstrip("/")
            if path == self._fs._strip_protocol(url).rstrip("/"):
                continue  # the empty object by which some tools mark a folder
            is_folder = info["type"] == "directory"
            entries.append(Entry(path.rpartition("/")[2], is_folder, info["size"] or 0))
        return sorted(entries)

    def size_and_version(self, url: str) -> tuple[int, str]:
        """Bytes of an object, and a text that is another one as soon as the object is."""
        info = self._patiently(self._fs.info, url)
        return info["size"], str(sorted(info.items()))

    def _type(self, url: str) -> str | None:
        try:
            return self._patiently(self._fs.info, url)["type"]
        except FileNotFoundError:
            return None

    def _patiently(self, action: Callable, *args: Any, **kwargs: Any) -> Any:
        for pause in (*PAUSES_SECS, None):
            try:
                return action(*args, **kwargs)
            except FileNotFoundError as error:
                raise FileNotFoundError(errno.ENOENT, "missing") from error
            # Every kind of store raises kinds of its own.
            except Exception as error:
                if pause is None or _is_final(error):
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    raise OSError(errno.EIO, reason) from error
                time.sleep(pause)


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError)):
        return True
    return getattr(error, "code", None) in _REFUSED or "Forbidden" in str(error)
