"""What S3, and stores that speak its language, need beyond what fsspec offers for every filesystem.

Credentials, region and endpoint come from where AWS' own tools take them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_PROFILE, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL. Other options of s3fs may be set in fsspec's configuration
(FSSPEC_S3, as JSON); they go before those below.
"""

import errno
import os
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import fsspec

from pipelines.errors import UserError

# botocore waits up to 1, 2, 4 ... 20 s before it makes a request again: about a minute in all.
_CONFIG: dict[str, Any] = {
    "connect_timeout": 5.0,  # seconds until a store takes a connection
    "read_timeout": 20.0,  # seconds without a byte of an answer; S3 begins its answers within one
    "retries": {"total_max_attempts": 10, "mode": "standard"},
}
# Where an answer is wanted within seconds: a wrong address is to be told, a lock to be renewed.
_BRISK_CONFIG: dict[str, Any] = {
    "connect_timeout": 3.0,
    "read_timeout": 4.0,
    "retries": {"total_max_attempts": 2, "mode": "standard"},
}
_DELETIONS = 3  # of what is left of a folder


def is_s3(uri: str) -> bool:
    """Whether a URI is in S3 or a store like it."""
    return uri.startswith(("s3://", "s3a://"))


def path(uri: str) -> str:
    """Bucket and key of a URI, as s3fs wants them; ``::`` and ``?`` in a key mean nothing."""
    return uri.partition("://")[2].strip("/")


def filesystem(*, brisk: bool = False) -> Any:
    """The S3 filesystem of this thread; a brisk one gives up within seconds.

    Files come and go in one stream each: s3fs resumes it where it breaks off, of parallel ones it begins none again.
    """
    from pipelines.storage.store import S3Store

    given = fsspec.config.conf.get("s3", {})
    config = (_BRISK_CONFIG if brisk else _CONFIG) | given.get("config_kwargs", {})
    return S3Store(**{"use_listings_cache": False, "max_concurrency": 1, **given, "config_kwargs": config})


def check_store(uri: str) -> None:
    """See to it, within seconds, that a store can be reached and listed; what is not S3 passes unseen.

    Raises:
        UserError: if it cannot; the message says what to do.
    """
    if not is_s3(uri):
        return
    try:
        next(_pages(filesystem(brisk=True), uri, MaxKeys=1))
    except OSError as error:
        bucket = path(uri).partition("/")[0]
        store = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        if error.errno == errno.EIO:
            advice = "check AWS_ENDPOINT_URL, and that the store is up and can be reached from here"
        elif isinstance(error, FileNotFoundError):
            advice = f"create the bucket {bucket!r}, or check its name and AWS_ENDPOINT_URL"
        else:
            advice = f"check bucket, region and AWS_ENDPOINT_URL, and that these credentials may list {bucket!r}"
        raise UserError(f"{uri} cannot be used: {error.strerror} (store: {store}); {advice}") from error


def is_dir(uri: str) -> bool:
    """Whether there is anything below a prefix, by one request; s3fs would list all of it."""
    try:
        return bool(next(_pages(filesystem(), uri, MaxKeys=1)).get("KeyCount"))
    except FileNotFoundError:
        return False


def list_keys(uri: str) -> list[str]:
    """Keys of the objects and prefixes directly below a prefix; where nothing is, s3fs would list the one above."""
    keys: list[str] = []
    for page in _pages(filesystem(), uri, Delimiter="/"):
        keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        keys += [entry["Key"] for entry in page.get("Contents", ()) if not entry["Key"].endswith("/")]
    return keys


def _pages(fs: Any, uri: str, **options: Any) -> Iterator[dict[str, Any]]:
    """The answers to a listing of what is below a URI."""
    bucket, key, _ = fs.split_path(path(uri))
    options |= {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    while True:
        page: dict[str, Any] = fs.call_s3("list_objects_v2", **options)
        yield page
        if not page.get("IsTruncated"):
            return
        options["ContinuationToken"] = page["NextContinuationToken"]


def remove(uri: str) -> None:
    """Delete an object and all below it, or raise; s3fs drops the failures among a thousand objects deleted at once."""
    for _ in range(_DELETIONS):
        filesystem().rm(path(uri), recursive=True)
        if not is_dir(uri):
            return
    raise OSError(errno.EBUSY, "some objects could not be deleted", uri)


def describe_object(uri: str) -> tuple[str, float]:
    """The entity tag of an object, which names this very version, and the seconds since it was written.

    Both times are the store's, so that clocks need not agree.
    """
    fs = filesystem(brisk=True)
    bucket, key, _ = fs.split_path(path(uri))
    head = fs.call_s3("head_object", Bucket=bucket, Key=key)
    now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
    return str(head["ETag"]), (now - head["LastModified"]).total_seconds()


def write_object_if(uri: str, data: bytes, *, tag: str | None) -> str:
    """Write an object in place of the version with a tag (None: of none), and return its new tag.

    Of two writers at once, one succeeds.

    Raises:
        FileExistsError: if it is not; also if it was written just so and the store's answer to that was lost.
        FileNotFoundError: if the version to replace is gone.
    """
    condition = {"mode": "create"} if tag is None else {"IfMatch": tag}
    return str(filesystem(brisk=True).pipe_file(path(uri), data, **condition)["ETag"])
