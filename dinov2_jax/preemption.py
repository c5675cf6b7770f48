"""Notices that a cloud is about to take this machine back, which come before SIGTERM or without it.

Google and Amazon each answer at an address that only the machine itself can ask; whose machine it
is, its firmware says. Elsewhere nothing is asked: SLURM and Kubernetes send SIGTERM.
"""

import contextlib
import http.client
import math
import os
import pathlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

# Of both; a name would have to be looked up, for which there is no time limit.
_ADDRESS = "169.254.169.254"
_VENDOR = pathlib.Path("/sys/class/dmi/id/sys_vendor")
EVERY_SECS = 5.0
_TIMEOUT_SECS = 2.0
# Tries until the first answer: a container that may not ask never gets one.
_MAX_FAILURES = 3
_FAULTS = (OSError, ValueError, http.client.HTTPException)
# Not by a proxy: the address is this machine's own.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _ask(url: str, *, method: str = "GET", **headers: str) -> str:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, headers=names, method=method)
    with _opener.open(request, timeout=_TIMEOUT_SECS) as answer:
        return answer.read().decode()


def google() -> str | None:
    """What Compute Engine says of this machine's end; None: nothing.

    Not of its maintenance, which is announced up to an hour before: SIGTERM comes when it begins.

    Raises:
      OSError, ValueError, HTTPException: it does not answer, or not as it should.
    """
    host = os.environ.get("GCE_METADATA_HOST") or _ADDRESS
    url = f"http://{host}/computeMetadata/v1/instance/preempted"
    is_preempted = _ask(url, Metadata_Flavor="Google") == "TRUE"
    return "Google preempts this machine" if is_preempted else None


def amazon() -> str | None:
    """What EC2 says of this spot machine's end, two minutes before it; None: nothing.

    Raises:
      OSError, ValueError, HTTPException: it does not answer, or not as it should.
    """
    host = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or f"http://{_ADDRESS}"
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
    if "Google" in vendor:
        return google
    is_allowed = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true"
    return amazon if "Amazon" in vendor and is_allowed else None


@contextlib.contextmanager
def watch_notices(tell: Callable[[str], None]) -> Iterator[None]:
    """Calls `tell` once, from a thread of its own, with the first notice that comes meanwhile."""
    ask = asker()
    if ask is None:
        yield
        return
    stop = threading.Event()
    threading.Thread(target=_watch, args=(ask, tell, stop), daemon=True).start()
    try:
        yield
    finally:
        stop.set()  # what it asks now need not be waited for


def _watch(
    ask: Callable[[], str | None], tell: Callable[[str], None], stop: threading.Event
) -> None:
    failures = 0
    while not stop.is_set() and failures < _MAX_FAILURES:
        try:
            notice, failures = ask(), -math.inf
        except _FAULTS:
            notice, failures = None, failures + 1
        if notice and not stop.is_set():
            tell(notice)
            return
        stop.wait(EVERY_SECS)
