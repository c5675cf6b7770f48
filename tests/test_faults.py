"""Which errors may pass, as Python, the stores' clients, TensorStore and XLA raise them."""

import errno
import socket

import jax
import pytest

from dinov2_jax.faults import PassingFault, may_pass, refusal


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def carrying(**attributes) -> Exception:
    error = Exception("of a client")
    vars(error).update(attributes)
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError("60 s"), True),
        (socket.gaierror(-3, "no network"), True),
        (OSError(errno.ESTALE, "stale"), True),
        (OSError(errno.EIO, "input/output"), False),  # of a disk: damage
        (OSError(errno.ENOSPC, "No space left"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (ModuleNotFoundError("gcsfs"), False),
        (KeyError("leaf"), False),
        (MemoryError(), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), True),
        # TensorStore 0.1.86 against stores that answer so, or not at all.
        (
            ValueError("ABORTED: All 2 retry attempts failed: Unknown [http_response_code='503']"),
            True,
        ),
        (ValueError("ABORTED: All 32 retry attempts failed: CURL error Could not connect"), True),
        (ValueError("PERMISSION_DENIED: Forbidden [http_response_code='403']"), False),
        (ValueError("NOT_FOUND: Not Found [http_response_code='404']"), False),
        (ValueError('DATA_LOSS: Error opening "zarr" driver'), False),
        (OSError("Forbidden: b/bucket"), False),  # gcsfs, 403
        (carrying(code=403), False),
        (carrying(code=404), False),
        (carrying(code="503"), True),
        (carrying(code=429), True),
        (carrying(code=501), False),  # a store that lacks what is asked for
        (carrying(code=lambda: 503), False),
        (carrying(status=500), True),
        (carrying(response=carrying(status_code=502)), True),
        (carrying(response={"ResponseMetadata": {"HTTPStatusCode": 500}}), True),
        (carrying(response={"ResponseMetadata": {"HTTPStatusCode": 403}}), False),
        (PassingFault("later"), True),
        (None, False),
    ],
)
def test_which_may_pass(error, passes):
    assert may_pass(error) == passes
    if error is not None:
        assert may_pass(caused(RuntimeError("cannot be used"), error)) == passes


def test_the_outermost_that_is_known_decides():
    assert not may_pass(caused(FileNotFoundError("gone"), TimeoutError()))
    assert may_pass(caused(OSError(errno.EIO, "HttpError"), carrying(code=500)))


def test_the_clients_own_errors():
    boto = pytest.importorskip("botocore.exceptions")
    s3fs = pytest.importorskip("s3fs.errors")
    for code, status, passes in [
        ("SlowDown", 503, True),
        ("InternalError", 500, True),
        ("NoSuchBucket", 404, False),
        ("InvalidAccessKeyId", 403, False),
    ]:
        answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        error = boto.ClientError(answer, "PutObject")
        assert may_pass(error) == may_pass(s3fs.translate_boto_error(error)) == passes
    assert may_pass(boto.EndpointConnectionError(endpoint_url="http://127.0.0.1:9"))
    assert may_pass(boto.ReadTimeoutError(endpoint_url="http://127.0.0.1:9"))
    assert not may_pass(boto.NoCredentialsError())
    aiohttp = pytest.importorskip("aiohttp")
    assert may_pass(aiohttp.ServerDisconnectedError())

    gcsfs = pytest.importorskip("gcsfs.retry")
    assert may_pass(gcsfs.HttpError({"code": 500, "message": "again"}))
    assert not may_pass(gcsfs.HttpError({"code": 401, "message": "who are you"}))
    for status, passes in [(400, False), (403, False), (404, False), (502, True), (503, True)]:
        with pytest.raises(Exception) as caught:
            gcsfs.validate_response(status, b"", "b/bucket")
        assert may_pass(caught.value) == passes, status
    google = pytest.importorskip("google.api_core.exceptions")
    auth = pytest.importorskip("google.auth.exceptions")
    assert may_pass(google.ServiceUnavailable("busy")) and may_pass(auth.TransportError("dns"))
    assert may_pass(google.RetryError("120 s", cause=None))
    assert not may_pass(google.NotFound("bucket")) and not may_pass(google.Forbidden("ada"))
    assert not may_pass(caused(auth.DefaultCredentialsError("none"), auth.TransportError("dns")))


def test_a_refusal_is_of_the_kind_that_is_asked_for_or_says_that_it_may_pass():
    error = refusal(ValueError, "bucket cannot be read", cause=PermissionError("ada"))
    assert type(error) is ValueError and str(error) == "bucket cannot be read"
    error = refusal(ValueError, "bucket cannot be read", cause=TimeoutError())
    assert type(error) is PassingFault
    assert str(error) == "bucket cannot be read; or it passes: run the same command again"
