"""A run whose data and workdir are in an object store: killed, resumed, refused."""

import http.server
import json
import os
import pathlib
import re
import sys
import threading
import time

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from dinov2_jax.checkpoints import Checkpoints, KeepPolicy
from dinov2_jax.convert.safetensors_file import read_safetensors
from dinov2_jax.metrics import MetricsWriter
from dinov2_jax.workdir import WorkdirError, open_workdir, workdir_path
from tests import object_store
from tests.small_run import repeatable, run, start, written_config

SETTINGS = dict(eval__kind="none", data__max_bad_fraction=0.5, loader__num_threads=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """A folder of ten images and two that cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(10):
        path = folder / f"class{i % 3}" / f"good{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path)
    for i in range(2):
        (folder / f"class{i}" / f"bad{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    return folder


@pytest.fixture
def place(any_bucket, tmp_path) -> epath.Path:
    """An empty folder of a store."""
    return epath.Path(any_bucket) / tmp_path.name


def upload(folder: pathlib.Path, target: epath.Path) -> None:
    for path in folder.rglob("*.png"):
        (target / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


def names(folder: epath.Path) -> set[str]:
    """Objects below a folder, as the store has them now."""
    store, path = fsspec.core.url_to_fs(str(folder), use_listings_cache=False)
    return {found.removeprefix(f"{path}/") for found in store.find(path)}


# gcsfs uploads in parts that aiohttp, which it does so with, finds large.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_killed_run_goes_on_and_equals_a_run_on_a_disk(cache, images, place, tmp_path, capsys):
    assert run(tmp_path, data__path=images, tensorboard="true", **SETTINGS) == 0
    local = capsys.readouterr().out

    workdir, data = place / "run", place / "images"
    upload(images, data)
    settings = SETTINGS | dict(data__path=data, tensorboard="true")
    process = start(workdir, cache, **settings)
    try:  # while the second checkpoint is being written, or right after
        deadline = time.monotonic() + 200
        while not any(found.startswith("checkpoints/8/") for found in names(workdir)):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert run(workdir, pictures="true", profile_steps="9:11", **settings) == 0
    out = capsys.readouterr().out
    assert re.search("resumed from step [48]\n", out) and f"from folder {data}" in out
    assert "12 images in 3 classes" in out and "12 images in 3 classes" in local

    assert repeatable(workdir) == repeatable(tmp_path)
    ours, theirs = ((w / "bad_images.txt").read_text() for w in (workdir, tmp_path))
    assert ours.replace(str(data), str(images)) == theirs and theirs.count("\n") == 2
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((workdir / "teacher.safetensors").read_bytes())
    theirs = read_safetensors(tmp_path / "teacher.safetensors")[0]
    for name, value in read_safetensors(copy)[0].items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert written_config(workdir)["data"]["path"] == str(data)
    assert len(json.loads((workdir / "environment.json").read_text())["starts"]) == 2
    found = names(workdir)
    assert {"crops.png", "pca.png", "model.json"} <= found
    assert any(name.endswith(".xplane.pb") for name in found)
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert events.count(b"total_loss") >= 7
    assert not [name for name in found if "tmp" in name]

    before = (workdir / "metrics.jsonl").read_bytes()
    assert run(workdir, **settings) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert run(workdir, seed=5, **settings) == 2
    assert "another configuration: seed: 0 -> 5" in capsys.readouterr().err
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_dry_run_writes_nothing(place, capsys):
    assert run(place / "run", "--dry_run") == 0
    assert re.search(rf"workdir +{place}/run\n", capsys.readouterr().out)
    assert not names(place)


def test_lines_wait_until_a_flush_and_events_come_with_them(place):
    place = place / "run"
    (place / ".lock").write_text("")
    with MetricsWriter(place, restored_step=None, tensorboard=True) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"total_loss": 1.0})
        assert (place / "metrics.jsonl").read_text().count("\n") == 1
        writer.flush()
        assert (place / "metrics.jsonl").read_text().count("\n") == 3
        (events,) = (place / "tensorboard").iterdir()
        assert events.read_bytes().count(b"total_loss") == 3
        writer.write(4, {"total_loss": 1.0})
    with MetricsWriter(place, restored_step=3) as writer:
        assert [line["step"] for line in writer.lines()] == [1, 2, 3]


def _state(value: float) -> dict:
    return {"w": jnp.full((64,), value)}


@pytest.mark.parametrize("damage", ["state/", "host/metadata"])
def test_a_damaged_checkpoint_is_set_aside(place, damage):
    directory = place / "checkpoints"
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(0.0)
    )
    with Checkpoints(directory, KeepPolicy(last=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _state(step), {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    for name in names(place):
        if name.startswith(f"checkpoints/3/{damage}") and not name.endswith("commit_success.txt"):
            (place / name).unlink()
    (directory / "7" / "state").mkdir(parents=True)
    (directory / "7" / "state" / "_METADATA").write_text("{}")  # of a killed save: not committed
    warnings = []
    with Checkpoints(directory, KeepPolicy(last=2)) as checkpoints:
        step, state, host = checkpoints.restore_latest(abstract, warn=warnings.append)
        assert (step, float(state["w"][0]), host) == (2, 2.0, {"step": 2})
        assert len(warnings) == 1 and "checkpoint 3 cannot be read" in warnings[0]
        checkpoints.save(3, _state(5.0), {"step": "again"})
        checkpoints.wait()
        assert checkpoints.restore_latest(abstract, warn=warnings.append)[2] == {"step": "again"}
    found = names(place)
    assert any(name.startswith("checkpoints_unreadable/3/") for name in found)
    assert not any(name.startswith("checkpoints/7/") for name in found)


def test_a_bucket_that_is_not_there_is_one_line(any_bucket, capsys):
    url = any_bucket.replace("://", "://no-such-")
    assert run(f"{url}/run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--workdir={url}/run cannot be used" in error
    assert "create the bucket" in error


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A store that lets nobody in."""

    def _refuse(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b'{"error": {"code": 403, "message": "ada has no storage.buckets.get"}}'
        self.send_response(403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _refuse

    def log_message(self, *_):
        pass


def test_no_permission_is_one_line(bucket, monkeypatch, capsys):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def forget_connections():
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        backend.fsspec_backend._get_filesystem.cache_clear()

    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in object_store.environment("gs", address).items():
        monkeypatch.setenv(name, value)
    forget_connections()
    try:
        assert run(f"{bucket}/run") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "ada has no storage.buckets.get" in error
        assert run(f"{bucket}/run", "--dry_run", data__path=f"{bucket}/images") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "data.path: gs://bucket/images cannot be read" in error
    finally:
        server.shutdown()
        server.server_close()
        forget_connections()


def test_a_workdir_is_on_a_disk_or_in_a_store(tmp_path, monkeypatch):
    assert workdir_path(str(tmp_path)) == epath.Path(tmp_path)
    for url in ("az://bucket/run", "memory://run", "http://host/run"):
        with pytest.raises(WorkdirError, match=r"must be a folder or at gs:// or s3://"):
            workdir_path(url)
    for kind, package, extra in (("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(WorkdirError, match=rf"pip install 'dinov2_jax\[{extra}\]'"):
            workdir_path(f"{kind}://bucket/run")


# The same, of what aiohttp finds large.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_what_is_compiled_can_lie_in_the_store(cache, place):
    """`JAX_COMPILATION_CACHE_DIR=gs://..`: where the hosts of a pod can find it."""
    hits = []

    def listen(event: str, **_) -> None:
        hits.append(event.endswith("/cache_hits"))

    jax.config.update("jax_compilation_cache_dir", str(place / "compiled"))
    compilation_cache.reset_cache()
    jax.monitoring.register_event_listener(listen)
    try:
        for _ in range(2):
            jax.jit(lambda x: 3 * x + len(place.name)).lower(jnp.zeros(5)).compile()
        assert any(name.endswith("-cache") for name in names(place / "compiled"))
        assert sum(hits) == 1
    finally:
        jax.monitoring.unregister_event_listener(listen)
        jax.config.update("jax_compilation_cache_dir", str(cache))
        compilation_cache.reset_cache()


def test_two_runs_cannot_be_told_apart_but_hosts_can(place):
    path = workdir_path(str(place / "run"))
    with open_workdir(path):
        first = (path / ".lock").read_text()
        with open_workdir(path):
            assert (path / ".lock").read_text() != first
    assert os.environ["EPATH_USE_TF"] == "false"
