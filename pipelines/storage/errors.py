"""Errors of S3: what to tell of each. botocore and s3fs have made the request again by then, where that may help."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import ClientError as HttpError
from botocore.exceptions import (
    BotoCoreError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import ConnectionError as UnreachableError
from botocore.parsers import ResponseParserError

from pipelines.errors import UserError

_BAD_CREDENTIALS = ("Token", "AccessKeyId", "SignatureDoesNotMatch", "UnrecognizedClient")  # within codes of refusals
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound)
_NO_ANSWER = (HTTPClientError, UnreachableError, IncompleteReadError, HttpError, ResponseParserError, TimeoutError)
# Answers that botocore does not take for passing: the body was damaged on its way, or others were at it.
_PASSING = {"BadDigest", "IncompleteBody", "OperationAborted"}


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Within the block, errors of s3fs and what is below it become those of ``explain_error``."""
    try:
        yield
    except Exception as error:
        explanation = explain_error(uri, error)
        if explanation is error:
            raise
        raise explanation from error


def explain_error(uri: str, error: Exception) -> Exception:
    """What to raise for an error that s3fs or what is below it raised when a URI was asked for.

    A ``UserError`` if credentials or the clock are wrong; else an ``OSError`` of the right kind, naming the URI:
    ``EIO`` if the store did not answer or failed, so that a later call may succeed. An error that no store makes, or
    that was explained before, is given back as it is.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return error
    code, status = _answer(error)
    if refusal := _refusal(uri, error, code):
        return refusal
    if code in ("PreconditionFailed", "ConditionalRequestConflict") or status == 412:
        return FileExistsError(errno.EEXIST, "is there already, or was changed meanwhile", uri)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, _words(error), uri)
    if isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, _words(error), uri)
    if code:
        passing = code in _PASSING or status in (408, 429) or status >= 500
        return OSError(errno.EIO if passing else errno.EINVAL, f"{code}: {_words(error)}", uri)
    if isinstance(error, _NO_ANSWER):
        return OSError(errno.EIO, _words(error), uri)
    if isinstance(error, BotoCoreError | ValueError):
        return OSError(errno.EINVAL, _words(error), uri)
    return error


def _refusal(uri: str, error: Exception, code: str) -> UserError | None:
    """What to tell where the store does not know who asks."""
    if isinstance(error, _NO_CREDENTIALS):
        return UserError(
            f"{uri}: no credentials for its store ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, and AWS_ENDPOINT_URL for a store other than AWS; on all machines of a cluster"
        )
    if any(word in code for word in _BAD_CREDENTIALS):
        return UserError(
            f"{uri}: its store refuses the credentials ({code}: {_words(error)}); renew or correct AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, then give the same command again"
        )
    if code == "RequestTimeTooSkewed":
        return UserError(
            f"{uri}: its store refuses this machine's clock ({code}: {_words(error)}); set the clock of this machine, "
            "or of the store, then give the same command again"
        )
    return None


def may_pass(error: Exception) -> bool:
    """Whether s3fs should make a request again though it would not of itself."""
    code, status = _answer(error)
    return code in _PASSING or status in (408, 429)


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
