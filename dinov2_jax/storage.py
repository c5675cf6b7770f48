"""Files of a run on a disk or in an object store (gs://, s3://): whole, growing, or made locally.

An object appears whole or not at all, but it can neither be appended to nor renamed, and what
writes by file names (safetensors, TensorBoard, the profiler) does not know it.
"""

import contextlib
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator

from etils import epath

from dinov2_jax.beside import written_beside

# An object that grows is written whole each time: not at every line.
SECS_BETWEEN_WRITES = 60.0


def is_url(path: epath.PathLike) -> bool:
    """Whether a path leads to an object store and not to a disk."""
    return "://" in str(path)


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Writes a small file so that it is there whole or as it was."""
    content = content.encode() if isinstance(content, str) else content
    if is_url(path):
        path.write_bytes(content)
        return
    with written_beside(path) as beside:
        beside.write_bytes(content)


class GrowingFile:
    """A text file that is added to.

    On a disk, what is added is handed to the file system at once. In an object store it is kept
    until `flush`, which must come before anything is saved that relies on it; without, an object
    is at most `SECS_BETWEEN_WRITES` behind when the next text is added.
    """

    def __init__(self, path: epath.Path):
        """Goes on with what is there; makes no file before there is something in it."""
        self._path = path
        self._parts = None  # the whole content of an object
        if is_url(path):
            self._parts = [path.read_text()] if path.exists() else []
        self._is_behind, self._written_at = False, -math.inf

    def add(self, text: str) -> None:
        """Adds to the end."""
        if self._parts is None:
            with self._path.open("a") as file:
                file.write(text)
            return
        self._parts.append(text)
        self._is_behind = True
        if time.monotonic() - self._written_at >= SECS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Returns when all that was added is where it belongs."""
        if self._is_behind:
            self._path.write_text("".join(self._parts))
            self._is_behind, self._written_at = False, time.monotonic()


@contextlib.contextmanager
def made_locally(path: epath.Path) -> Iterator[pathlib.Path]:
    """A local path for a file or folder; of an object store, it is uploaded when it is complete."""
    if not is_url(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="dinov2_jax_") as folder:
        local = pathlib.Path(folder) / path.name
        yield local
        upload(local, path)


def upload(local: pathlib.Path, path: epath.Path) -> None:
    """Writes a local file, or every file below a local folder, to an object store."""
    import fsspec

    store, _ = fsspec.core.url_to_fs(str(path))
    if local.is_file():
        store.put_file(str(local), str(path))
        return
    for file in sorted(local.rglob("*")):
        if file.is_file():
            store.put_file(str(file), str(path / file.relative_to(local).as_posix()))


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder to where nothing is; in a store object by object, within a bucket."""
    if is_url(folder):
        import fsspec

        store, path = fsspec.core.url_to_fs(str(folder))
        objects = store.find(path)  # not `mv` of the folder: no object has its name
        if objects:
            store.copy(objects, [f"{target}{name.removeprefix(path)}" for name in objects])
            store.rm(objects)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
