"""The workdir: one run at a time, a guarded configuration, bad images named once."""

import contextlib
import errno
import json
import os

import numpy as np
import pytest

from dinov2_jax.data.records import DataError
from dinov2_jax.faults import PassingFault
from dinov2_jax.workdir import (
    BadImages,
    WorkdirError,
    check_unchanged,
    is_disk_full,
    open_workdir,
)


def test_it_is_created_and_held_until_it_is_left(tmp_path):
    path = tmp_path / "runs" / "new"
    with open_workdir(path) as workdir:
        assert workdir.is_dir()
        with pytest.raises(WorkdirError, match="in use"), open_workdir(path):
            pass
    with open_workdir(path):
        pass


@pytest.mark.parametrize(("code", "is_refused"), [(errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_without_locks_is_good_enough(tmp_path, monkeypatch, code, is_refused):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    refusal = pytest.raises(WorkdirError, match="cannot be written")
    with refusal if is_refused else contextlib.nullcontext(), open_workdir(tmp_path) as workdir:
        assert (workdir / ".lock").read_text()


def test_a_file_system_that_may_come_back_is_a_passing_fault(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(PassingFault, match=r"cannot be written .*run the same command again"):
        with open_workdir(tmp_path):
            pass


def test_one_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"cannot be written .*choose another"):
        with open_workdir(tmp_path / "file" / "run"):
            pass


def test_a_changed_or_unreadable_configuration_is_refused(tmp_path):
    old, new = {"optim": {"clip_norm": 3.0}, "remat": "none"}, {"optim": {"clip_norm": 1.0}}
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read"):
        check_unchanged(tmp_path, new, allow=False, say=print)
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_unchanged(tmp_path, {**old, "remat": "blocks"}, allow=False, say=print)
    with pytest.raises(WorkdirError, match=r"optim\.clip_norm: 3\.0 -> 1\.0; choose"):
        check_unchanged(tmp_path, new, allow=False, say=print)
    said = []
    check_unchanged(tmp_path, new, allow=True, say=said.append)
    assert said == ["configuration changed: optim.clip_norm: 3.0 -> 1.0"]


def _open(workdir, *, max_fraction=1.0, rejected=(("scan.png", "zero bytes"),)):
    return BadImages(
        workdir,
        rejected=list(rejected),
        num_images=9,
        max_fraction=max_fraction,
        explain=lambda record: (f"{record}.png", "truncated\nfile"),
    )


def test_bad_images_are_named_once_over_batches_and_restarts(tmp_path):
    bad = _open(tmp_path)
    bad.add(np.array([-1, 5, -1, 5, 2]))
    bad.add(np.array([2, -1]))
    assert bad.count == 3 and bad.records == {2, 5}
    again = _open(tmp_path)
    again.add(np.array([2, 3]))
    assert again.count == 3  # what this start has seen, and the scan
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert lines == [
        "scan.png\tzero bytes",
        "2.png\ttruncated file",
        "5.png\ttruncated file",
        "3.png\ttruncated file",
    ]


def test_more_than_the_allowed_fraction_is_an_error(tmp_path):
    bad = _open(tmp_path, max_fraction=0.2)  # 2 of 10
    bad.add(np.array([4, -1]))
    with pytest.raises(DataError, match=r"3 of 10 images .*max_bad_fraction=0\.2 .*bad_images"):
        bad.add(np.array([5]))


def test_a_full_disk_is_recognised_through_causes():
    cause = OSError(28, "No space left on device")
    error = RuntimeError("save failed")
    error.__cause__ = cause
    assert is_disk_full(cause) and is_disk_full(error)
    assert is_disk_full(ValueError("RESOURCE_EXHAUSTED: write: No space left on device"))
    assert not is_disk_full(OSError(13, "Permission denied")) and not is_disk_full(None)
