"""Notices that a cloud is about to take this machine back, which come before SIGTERM or without it.

Google and Amazon each answer at an address that only the machine itself can ask; whose machine it
is, its firmware says. Elsewhere nothing is asked: SLURM and Kubernetes send SIGTERM.
"""

import contextlib
import os
import pathlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

_VENDOR = pathlib.Path("/sys/class/dmi/id/sys_vendor")
EVERY_SECS = 5.0
_TIMEOUT_SECS = 2.0
# Unreachable so many times in a row: a container that may not ask. Nothing more will come.
_MAX_FAILURES = 3
# Not by a proxy: the address is this machine's own.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _ask(url: str, *, method: str = "GET", **headers: str) -> str:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, headers=names, method=method)
    with _opener.open(request, timeout=_TIMEOUT_SECS) as answer:
        return answer.read().decode()


def google() -> str | None:
    """What Compute Engine says of this machine's end; None: nothing.

    Raises:
      OSError: it does not answer.
    """
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    folder = f"http://{host}/computeMetadata/v1/instance"
    if _ask(f"{folder}/preempted", Metadata_Flavor="Google") == "TRUE":
        return "Google preempts this machine"
    if _ask(f"{folder}/maintenance-event", Metadata_Flavor="Google").startswith("TERMINATE"):
        return "Google terminates this machine for maintenance"
    return None


def amazon() -> str | None:
    """What EC2 says of this spot machine's end, two minutes before it; None: nothing.

    Raises:
      OSError: it does not answer.
    """
    host = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
    folder = f"{host.rstrip('/')}/latest"
    token = _ask(f"{folder}/api/token", method="PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    try:
        said = _ask(f"{folder}/meta-data/spot/instance-action", X_aws_ec2_metadata_token=token)
    except urllib.error.HTTPError as error:
        if error.code == 404:  # nothing is to happen, or the machine is no spot machine
            return None
        raise
    return f"Amazon takes this machine back: {' '.join(said.split())}"


def asker() -> Callable[[], str | None] | None:
    """Who is to be asked on this machine; None: nobody."""
    try:
        vendor = _VENDOR.read_text()
    except OSError:
        return None
    return google if "Google" in vendor else amazon if "Amazon" in vendor else None


@contextlib.contextmanager
def watch_notices(tell: Callable[[str], None]) -> Iterator[None]:
    """Calls `tell` once, from a thread of its own, with the first notice that comes meanwhile."""
    ask = asker()
    if ask is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(ask, tell, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(
    ask: Callable[[], str | None], tell: Callable[[str], None], stop: threading.Event
) -> None:
    failures = 0
    while not stop.is_set() and failures < _MAX_FAILURES:
        try:
            notice, failures = ask(), 0
        except OSError:
            notice, failures = None, failures + 1
        if notice:
            tell(notice)
            return
        stop.wait(EVERY_SECS)
