"""A job's video in an answer: whole, or the range of bytes that a browser asks for as somebody moves about in it."""

import asyncio
import os
import re
from collections.abc import Mapping

from fastapi import Request, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from pipelines.generation.serving.jobs import JobStore

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)


async def file_answer(
    store: JobStore, job_id: str, name: str, request: Request, headers: Mapping[str, str], media_type: str
) -> Response:
    """A file of a job, or one range of it; a request for several, or for what is none, gets the whole.

    Raises:
        FileNotFoundError: if there is none.
        HTTPException: 416, if nothing of it is in the range.
    """
    path, tag = store.local_path(job_id, name), f'"{job_id}-{name}"'  # a file of that name never changes
    status = await asyncio.to_thread(os.stat, path) if path is not None else None
    size = status.st_size if status is not None else await asyncio.to_thread(store.file_size, job_id, name)
    headers = {**headers, "Accept-Ranges": "bytes", "ETag": tag}
    wanted = _range_of(request, size, tag)
    if path is not None:
        return _LocalFile(path, ranged=wanted is not None, stat_result=status, headers=headers, media_type=media_type)
    start, stop = wanted or (0, size)
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(size)}, media_type=media_type)
    data = await asyncio.to_thread(store.read_range, job_id, name, start, stop)
    if wanted is None:
        return Response(data, media_type=media_type, headers=headers)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(data, 206, media_type=media_type, headers=headers)


def _range_of(request: Request, size: int, tag: str) -> tuple[int, int] | None:
    """The first byte that is asked for and the one behind the last; None for the whole."""
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or request.method != "GET" or request.headers.get("if-range", tag) != tag:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:  # the last so many
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:  # which is no range, and no reason for an error
            return None
    if start >= size:
        raise HTTPException(
            416, f"Range: the file has {size} bytes, none of them is asked for", {"Content-Range": f"bytes */{size}"}
        )
    return start, stop


class _LocalFile(FileResponse):
    """A file on a disk. What is no range for us is none for Starlette, which would answer in a form of its own."""

    def __init__(
        self,
        path: str,
        *,
        ranged: bool,
        stat_result: os.stat_result | None,
        headers: Mapping[str, str],
        media_type: str,
    ) -> None:
        super().__init__(path, stat_result=stat_result, headers=headers, media_type=media_type)
        self._ranged = ranged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._ranged:
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"range"]}
        await super().__call__(scope, receive, send)
