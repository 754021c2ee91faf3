"""The S3 filesystem of data and checkpoints; imported only where an S3 URI is used, as it takes a second.

botocore makes a failed request again, as ``s3.filesystem`` configures it; s3fs makes one again whose answer was cut
short, and resumes a download. What neither sees to is here.
"""

import hashlib
from typing import Any

from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import set_custom_error_handler

from pipelines.storage.errors import explained, may_pass

set_custom_error_handler(may_pass)


class S3Store(S3FileSystem):  # type: ignore[misc]
    """s3fs with errors that say what is wrong."""

    retries = 4  # of s3fs: of an answer that was cut short, and resumptions of a download

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        name = kwargs.get("Key") or kwargs.get("Prefix") or ""
        with explained(f"s3://{kwargs.get('Bucket', '')}/{name}".rstrip("/")):
            try:
                return await super()._call_s3(method, *args, **kwargs)
            except FileNotFoundError:
                if method == "complete_multipart_upload" and await self._is_complete(**kwargs):
                    return {}
                raise

    call_s3 = sync_wrapper(_call_s3)

    async def _is_complete(self, *, Bucket: str, Key: str, MultipartUpload: Any, **_: Any) -> bool:  # noqa: N803
        """Whether an upload was completed before, by a request whose answer was lost; to ask again is an error."""
        parts = [part["ETag"].strip('"') for part in MultipartUpload["Parts"]]
        digest = hashlib.md5(bytes.fromhex("".join(parts)), usedforsecurity=False).hexdigest()
        head = await super()._call_s3("head_object", Bucket=Bucket, Key=Key)
        return bool(head["ETag"].strip('"') == f"{digest}-{len(parts)}")

    async def _cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        with explained(f"s3://{path}"):
            return bytes(await super()._cat_file(path, *args, **kwargs))

    async def _get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        with explained(f"s3://{rpath}"):
            await super()._get_file(rpath, lpath, *args, **kwargs)
