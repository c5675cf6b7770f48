"""The workdir: opened for one run at a time, its configuration guarded, its small files written.

Files: config.json, model.json, metrics.jsonl, environment.json, checkpoints/, teacher.safetensors,
bad_images.txt, nonfinite/, crops.png, pca.png, tensorboard/, profile/.
"""

import contextlib
import errno
import fcntl
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dinov2_jax import object_stores
from dinov2_jax.config import compare_configs
from dinov2_jax.data.records import DataError, too_many_bad
from dinov2_jax.distributed import check_same
from dinov2_jax.faults import refusal
from dinov2_jax.storage import GrowingFile, is_url

CONFIG_FILE = "config.json"
BAD_IMAGES_FILE = "bad_images.txt"
LOCK_FILE = ".lock"
# What a file system without locks says: Lustre as it is often mounted, some of FUSE's.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class WorkdirError(RuntimeError):
    """A workdir that cannot be used; its text is one line for the user."""


def workdir_path(path: str) -> epath.Path:
    """The path of a workdir, on a disk, at gs:// or at s3://; every process must get it here.

    Raises:
      WorkdirError: another kind of URL, or the package for it is missing.
    """
    if is_url(path):
        try:
            object_stores.prepare(path)
        except object_stores.StoreError as error:
            raise WorkdirError(f"--workdir={path} {error}") from error
    return epath.Path(path)


@contextlib.contextmanager
def open_workdir(path: epath.PathLike) -> Iterator[epath.Path]:
    """Creates the workdir, finds out whether it can be written, and holds it for this process.

    An object store has no locks, nor have some file systems: of two runs there, neither is refused.

    Raises:
      WorkdirError: it cannot be created or written, or another run holds it.
      PassingFault: it cannot be reached now.
    """
    workdir = epath.Path(path)
    if is_url(workdir):
        try:
            object_stores.check_access(workdir, probe=LOCK_FILE)
        except object_stores.StoreError as error:
            raise refusal(WorkdirError, f"--workdir={workdir} {error}", cause=error) from error
        yield workdir
        return
    lock = None
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / LOCK_FILE
        # Released when the process ends, in whatever way.
        lock = open(probe, "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        probe.write_text(secrets.token_hex())
    except BlockingIOError as error:
        lock.close()
        raise WorkdirError(
            f"--workdir={workdir} is in use by another run; wait for it, or choose another"
        ) from error
    except OSError as error:
        if lock is not None:
            lock.close()
        text = f"--workdir={workdir} cannot be written ({error.strerror or error}); choose another"
        raise refusal(WorkdirError, text, cause=error) from error
    try:
        yield workdir
    finally:
        if lock is not None:
            lock.close()


def check_shared(workdir: epath.Path) -> None:
    """Checks that all processes see the workdir which the primary one has opened.

    Raises:
      HostError: on every process, if one sees another.
    """
    lock = workdir / LOCK_FILE
    token = lock.read_text() if lock.exists() else "nothing"
    check_same(f"folder at --workdir={workdir} (it must be shared by all hosts)", token)


def clear_leftovers(workdir: epath.Path, names: Sequence[str]) -> None:
    """Removes files and folders that a first try left before its first checkpoint."""
    for name in names:
        path = workdir / name
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def check_unchanged(
    workdir: epath.Path, config: Mapping[str, Any], *, allow: bool, say: Callable[[str], None]
) -> None:
    """Compares with the configuration that the checkpoints of this workdir were made with.

    Raises:
      WorkdirError: a result-changing key differs and `allow` is False.
      PassingFault: the workdir cannot be reached now.
    """
    try:
        old = json.loads((workdir / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        text = (
            f"{workdir / CONFIG_FILE} cannot be read ({error}), so what this run was started with "
            "is unknown; restore the file, or choose another --workdir"
        )
        raise refusal(WorkdirError, text, cause=error) from error
    differences = compare_configs(old, config)
    if not differences:
        return
    if not allow:
        raise WorkdirError(
            f"--workdir={workdir} holds a run with another configuration: "
            f"{'; '.join(differences)}; choose another --workdir, set the keys back, or add "
            "--allow_config_change to go on from its last checkpoint all the same"
        )
    for line in differences:
        say(f"configuration changed: {line}")


class BadImages:
    """Counts the images that could not be read, and names each once in bad_images.txt."""

    def __init__(
        self,
        workdir: epath.Path,
        *,
        rejected: Sequence[tuple[str, str]],
        num_images: int,
        max_fraction: float,
        explain: Callable[[int], tuple[str, str]],
        is_writer: bool = True,
    ):
        """Opens the list, and enters what was rejected at the scan.

        Args:
          workdir: holds the list.
          rejected: (name, reason) of each image found bad at the scan.
          num_images: found at the scan, the rejected ones not included.
          max_fraction: share of all of them above which the run must stop; unless it is 0, a
            single bad image never stops it.
          explain: record number -> (name, reason).
          is_writer: False: another process writes the list, this one only counts.

        Raises:
          DataError: more were rejected than `max_fraction` allows.
        """
        self._path = workdir / BAD_IMAGES_FILE
        self._named = set()
        if self._path.exists():
            text = self._path.read_text()
            self._named = {line.split("\t")[0] for line in text.splitlines()}
        self._rejected, self._explain = len(rejected), explain
        self._num_images, self._max_fraction = num_images + len(rejected), max_fraction
        self.records: set[int] = set()  # those found bad when they were decoded
        self._file = GrowingFile(self._path) if is_writer else None
        for name, reason in rejected:
            self._name(name, reason)
        self._check()

    @property
    def count(self) -> int:
        """Different bad images so far: at the scan, and in the batches trained on."""
        return self._rejected + len(self.records)

    def add(self, bad_record: np.ndarray) -> None:
        """Enters the bad records of one batch; -1 stands for a good image.

        Raises:
          DataError: more images are bad than `data.max_bad_fraction` allows.
        """
        for record in sorted(set(bad_record[bad_record >= 0].tolist()) - self.records):
            self.records.add(record)
            if self._file:
                self._name(*self._explain(record))
        self._check()

    def flush(self) -> None:
        """Returns when the list has every name; before a checkpoint that knows them."""
        if self._file:
            self._file.flush()

    def _check(self) -> None:
        if too_many_bad(self.count, self._num_images, self._max_fraction):
            self.flush()
            raise DataError(
                f"{self.count} of {self._num_images} images cannot be read, more than "
                f"data.max_bad_fraction={self._max_fraction:g} allows; they are named in "
                f"{self._path}: repair or remove them, or raise data.max_bad_fraction"
            )

    def _name(self, name: str, reason: str) -> None:
        name, reason = (" ".join(text.split()) for text in (name, reason))
        if name in self._named or not self._file:
            return
        self._named.add(name)
        self._file.add(f"{name}\t{reason}\n")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that there is no space left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(error) for text in ("No space left", "Disk quota", "File too large")):
            return True
        error = error.__cause__ or error.__context__
    return False
