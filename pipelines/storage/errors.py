"""Errors of object stores: which of them waiting helps, and what to tell of the others.

botocore makes a failed request again, s3fs resumes a download that breaks off; what fails all the same is begun again
as a whole here, for ``PATIENCE_SECONDS``.
"""

import errno
import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.errors import UserError

PATIENCE_SECONDS = 120.0
_LONGEST_WAIT = 20.0  # seconds
_T = TypeVar("_T")

_BAD_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "UnrecognizedClientException",
}
_PASSING = {
    "BadDigest",  # what arrived is not what was sent
    "IncompleteBody",
    "InternalError",
    "NoSuchUpload",  # the answer to the request that completed it was lost
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_CHANGED = {"PreconditionFailed", "ConditionalRequestConflict"}
_PASSING_ERRNO = {
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
}


def persist(uri: str, operation: Callable[[], _T], *, seconds: float | None = None) -> _T:
    """The result of an operation that may be done twice, begun again while it fails for reasons that may pass.

    Args:
        uri: What it is about.
        operation: Calls of a filesystem, no more.
        seconds: No attempt begins later. Default: ``PATIENCE_SECONDS``.

    Raises:
        OSError: if it fails for good, or still.
        UserError: if credentials are missing or refused.
    """
    end = time.monotonic() + (PATIENCE_SECONDS if seconds is None else seconds)
    for attempt in itertools.count():
        try:
            return operation()
        except Exception as error:
            told, passing = explain_error(uri, error)
            wait = random.uniform(0.5, 1.0) * min(2.0**attempt, _LONGEST_WAIT)
            if not passing or time.monotonic() + wait > end:
                raise told from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def explain_error(uri: str, error: Exception) -> tuple[Exception, bool]:
    """What to raise for an error that s3fs or what is below it raised, and whether the same call may yet succeed.

    Args:
        uri: What was asked for.
        error: Of the call. One that no store makes is given back as it is.

    Returns:
        A ``UserError`` if credentials are missing or refused; else an ``OSError`` of the right kind, naming the URI.
    """
    from aiohttp import ClientError as HttpError
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    code, status = _answer(error)
    missing = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.ProfileNotFound,
    )
    if isinstance(error, missing):
        return UserError(
            f"{uri}: no credentials for its store ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, and AWS_ENDPOINT_URL for a store other than AWS; on all machines of a cluster"
        ), False
    if code in _BAD_CREDENTIALS:
        return UserError(
            f"{uri}: its store refuses the credentials ({code}: {_words(error)}); renew or correct AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, then give the same command again"
        ), False
    if code in _CHANGED or status == 412:
        return FileExistsError(errno.EEXIST, "is there already, or was changed meanwhile", uri), False
    broken = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
    if isinstance(error, (*broken, HttpError, ResponseParserError)):
        return OSError(errno.EIO, _words(error), uri), not isinstance(error, exceptions.SSLError)
    if isinstance(error, exceptions.BotoCoreError | ValueError):
        return OSError(errno.EINVAL, _words(error), uri), False
    if not isinstance(error, OSError):
        return error, False
    if code in _PASSING or status in (408, 429) or status >= 500:
        return OSError(errno.EIO, f"{code}: {_words(error)}", uri), True
    passing = isinstance(error, TimeoutError) or error.errno in _PASSING_ERRNO
    for kind, number in ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES)):
        if isinstance(error, kind):
            return kind(number, _words(error), uri), False
    return error, passing


def _answer(error: Exception) -> tuple[str, int]:
    """The store's error code and HTTP status behind an error; "" and 0 where it did not answer."""
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status)
    return "", 0


def _words(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__
