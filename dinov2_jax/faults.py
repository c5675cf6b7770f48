"""Which errors may pass: a store or a network that does not answer now, or too little memory.

The command then ends with 1, and what restarts it (`launch/jobset.yaml`) may; a refusal, such as no
such bucket or no permission, ends it with 2. Nothing of a client is imported here: each raises
kinds of its own, which are known by their names and by what they carry.
"""

import errno
import re

_STATUS_PASSES = (408, 429, *(code for code in range(500, 600) if code != 501))
# Of Python, requests (gcsfs, google-cloud-storage), aiohttp (gcsfs, s3fs), botocore, google-auth.
_PASSES = {
    "ConnectionError",
    "TimeoutError",
    "gaierror",
    "MemoryError",
    "Timeout",
    "ChunkedEncodingError",
    "ClientConnectionError",
    "ClientPayloadError",
    "HTTPClientError",
    "TransportError",
    "RetryError",
    "ChecksumError",
}
_STAYS = {
    "FileNotFoundError",
    "FileExistsError",
    "PermissionError",
    "IsADirectoryError",
    "NotADirectoryError",
    "ImportError",
    "DefaultCredentialsError",
    "NoCredentialsError",
}
_NUMBERS_PASS = (
    errno.ESTALE,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOMEM,
)
# TensorStore and XLA say it in the text alone; what TensorStore has retried in vain is ABORTED.
_TEXT_PASSES = re.compile(r"\b(ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED): ")


class PassingFault(OSError):
    """What may be over when the same command runs again; its text is one line for the user."""


def may_pass(error: BaseException | None) -> bool:
    """Whether an error comes of what may be over later.

    The outermost of it and its causes that is known decides; one that nobody knows stays.

    Args:
      error: as it was caught, with its causes.
    """
    while error is not None:
        status, names = _status(error), {kind.__name__ for kind in type(error).__mro__}
        if status is not None:
            return status in _STATUS_PASSES
        if names & _STAYS:
            return False
        if isinstance(error, PassingFault) or names & _PASSES:
            return True
        if isinstance(error, OSError) and error.errno in _NUMBERS_PASS:
            return True
        if _TEXT_PASSES.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def refusal(kind: type[Exception], text: str, *, cause: Exception) -> Exception:
    """What to raise because of an error.

    Args:
      kind: of what stays.
      text: one line for the user.
      cause: the error.

    Returns:
      A `PassingFault` if the cause may pass, else one of `kind`.
    """
    if may_pass(cause):
        return PassingFault(f"{text}; or it passes: run the same command again")
    return kind(text)


def _status(error: BaseException) -> int | None:
    """HTTP's, of 400 and more; each client has it at another place."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        found = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        found = [getattr(error, name, None) for name in ("code", "status")]
        found.append(getattr(response, "status_code", None))
    for status in found:  # gcsfs has some as text; a gRPC error's is a method
        if isinstance(status, (int, str)) and re.fullmatch(r"[45]\d\d", f"{status}"):
            return int(status)
    return None
