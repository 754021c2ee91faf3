"""A job's video in an answer: whole, or the range of bytes that a browser asks for as somebody moves about in it."""

import asyncio
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, BinaryIO

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from pipelines.generation.serving.jobs import JobStore

_PIECE = 256 * 1024  # bytes that are read at once
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
    with ExitStack() as stack:
        # Once open, a file is sent whole, whoever deletes it meanwhile.
        file = stack.enter_context(await asyncio.to_thread(open, path, "rb")) if path is not None else None
        size = os.fstat(file.fileno()).st_size if file else await asyncio.to_thread(store.file_size, job_id, name)
        wanted = _range_of(request, size, tag)
        start, stop = wanted or (0, size)
        headers = {**headers, "Accept-Ranges": "bytes", "ETag": tag, "Content-Length": str(stop - start)}
        if wanted is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        code = 200 if wanted is None else 206
        if request.method == "HEAD":
            return Response(status_code=code, media_type=media_type, headers=headers)
        if file is not None:
            stack.pop_all()  # it is closed behind the last byte, or as the client leaves
            return _LocalFile(file, start, stop, code, media_type=media_type, headers=headers)
    data = await asyncio.to_thread(store.read_range, job_id, name, start, stop)
    return Response(data, code, media_type=media_type, headers=headers)


class _LocalFile(StreamingResponse):
    """Bytes of an open file, which is closed behind them."""

    def __init__(self, file: BinaryIO, start: int, stop: int, code: int, **options: Any) -> None:
        super().__init__(_pieces(file, start, stop), code, **options)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop and (piece := file.read(min(_PIECE, stop - start))):
        start += len(piece)
        yield piece


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
