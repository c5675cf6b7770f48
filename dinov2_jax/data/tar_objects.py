"""The index of tar shards in an object store, made once and remembered. Numpy only.

The headers of a tar file lie between its members, so that a shard has to be read once as a whole.
Its index is then kept, in the user's cache or where `DINOV2_JAX_TAR_INDEX` says: at a URL that
all hosts share, each reads a part of the shards and finds the rest.
"""

import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import random

from dinov2_jax.beside import written_beside
from dinov2_jax.data.files import DISK, Store
from dinov2_jax.data.tar_index import ShardIndex, index_tar
from dinov2_jax.faults import may_pass

VARIABLE = "DINOV2_JAX_TAR_INDEX"
CHUNK_BYTES = 2**24
NUM_SHARDS_AT_A_TIME = 8  # each holds one chunk
_FORMAT = 1  # of what is kept


class Window:
    """An object that is read from its beginning to its end, in large parts; seen as bytes."""

    def __init__(self, store: Store, url: str, size: int):
        self._store, self._url, self._size = store, url, size
        self._start, self._bytes = 0, b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop = part.start or 0, min(part.stop, self._size)
        if start >= stop:
            return b""
        if start < self._start or stop > self._start + len(self._bytes):
            size = min(max(CHUNK_BYTES, stop - start), self._size - start)
            self._start, self._bytes = start, self._store.read_range(self._url, start, size)
        return self._bytes[start - self._start : stop - self._start]


def index_objects(shards: list[str], store: Store) -> list[ShardIndex]:
    """The index of each shard, several at a time; what cannot be read is rejected.

    Raises:
      DataError: a shard is compressed.
      OSError: a shard cannot be read now, by what may pass.
    """
    cache = _Cache()
    order = list(range(len(shards)))
    random.Random(os.urandom(8)).shuffle(order)  # each host begins with others
    with concurrent.futures.ThreadPoolExecutor(NUM_SHARDS_AT_A_TIME) as pool:
        waiting = {i: pool.submit(_index, shards[i], store, cache) for i in order}
        try:
            return [waiting[i].result() for i in range(len(shards))]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _index(shard: str, store: Store, cache: "_Cache") -> ShardIndex:
    try:
        size, version = store.size_and_version(shard)
        if not size:
            return ShardIndex(rejected=[(shard, "zero bytes")])
        key = f"{_FORMAT} {shard} {version}"
        index = cache.get(key)
        if index is None:
            index = index_tar(shard, Window(store, shard, size))
            cache.put(key, index)
        return index
    except OSError as error:
        if may_pass(error):  # without the shard it would be another data set
            raise
        return ShardIndex(rejected=[(shard, error.strerror or "unreadable")])


class _Cache:
    """Indexes by key, in a folder or at a URL; one that is damaged is not there."""

    def __init__(self):
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self._place = os.environ.get(VARIABLE) or f"{home}/dinov2_jax/tar_index"
        self._store = Store(self._place) if "://" in self._place else None

    def get(self, key: str) -> ShardIndex | None:
        try:
            content = (self._store or DISK).read(self._path(key))
            return ShardIndex(**json.loads(gzip.decompress(content)))
        except (OSError, EOFError, ValueError, TypeError):
            return None

    def put(self, key: str, index: ShardIndex) -> None:
        content = gzip.compress(json.dumps(dataclasses.asdict(index)).encode(), mtime=0)
        with contextlib.suppress(OSError):  # a place that cannot be written: it costs time only
            if self._store:
                self._store.write(self._path(key), content)
            else:
                path = pathlib.Path(self._path(key))
                path.parent.mkdir(parents=True, exist_ok=True)
                with written_beside(path, mark=f"{os.getpid()}") as beside:
                    beside.write_bytes(content)

    def _path(self, key: str) -> str:
        name = hashlib.sha256(key.encode()).hexdigest()
        return f"{os.path.expanduser(self._place)}/{name}.json.gz"
