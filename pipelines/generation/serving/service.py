"""What the routes share: models and jobs, how a body is read, a video is drawn at once, and an error is told."""

import asyncio
import base64
import binascii
import math
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from lumos.compression import TEMPORAL_FACTOR, VideoSize
from pipelines.decoding.given import GivenError, GivenLimits, OtherKindError, read_clip, read_image
from pipelines.decoding.video_file import IMAGE_BRANDS
from pipelines.errors import UserError
from pipelines.generation.config import ServeConfig
from pipelines.generation.generator import Progress
from pipelines.generation.request import Refusal, VideoRequest
from pipelines.generation.serving.observe import Metrics
from pipelines.generation.serving.requests import Served, extended, to_request
from pipelines.generation.serving.runner import JobRunner, TooManyJobsError
from pipelines.generation.serving.schema import (
    BadRequestError,
    ErrorBody,
    ErrorDetail,
    ExtensionBody,
    ImageReference,
    VideoBody,
    parse_form,
    parse_json,
)

STATUS = {"full": 503, "lost": 503, "timeout": 504, "invalid": 400, "failed": 500}
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_FIELDS = 30
_MAX_PART = 1 << 26  # bytes; bodies are shorter
_DATA_URL = re.compile(r"data:([a-z0-9.+/-]*)((?:;[a-z0-9=._-]+)*),", re.IGNORECASE)
_LIMITS = GivenLimits(max_seconds=20.0)
_ANY_FRAMES = 1 << 30  # of a clip of unknown length
_DECODERS = 2  # files of strangers that are decoded at a time
_CLIPS = (b"ftyp", b"\x1aE\xdf\xa3", b"AVI ", b"moov", b"mdat")  # within the first bytes of videos
_REMEDIES = {  # by field, of a picture in the place of a clip, or the other way round
    "input_reference": "send it with its own media type (image/..., video/...)",
    "video": "a video begins with it where it is the input_reference of POST /v1/videos",
}

BodyT = TypeVar("BodyT", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """A file of a client, and the media type that it gives it."""

    data: bytes
    kind: str


class Service:
    """The state of one API process."""

    def __init__(self, models: Mapping[str, Served], config: ServeConfig, runner: JobRunner, metrics: Metrics) -> None:
        self.models, self.config, self.runner, self.metrics = models, config, runner, metrics
        # Of threads, as a client that leaves frees none before its file is decoded, or its time is over.
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decoder")

    def model(self, name: str | None) -> Served:
        """The model of a name; the first where none is given."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise BadRequestError(
                f"model: {name!r:.100} is not served here; there are: {', '.join(self.models)}", "model"
            )
        return self.models[name]

    async def draw(self, served: Served, request: VideoRequest) -> bytes | Refusal:
        """A video at once; what is drawn is stopped where the caller is cancelled."""

        async def on_progress(progress: Progress) -> None:
            if progress.done == 0:
                self.metrics.batch_began(served.name, request, progress.batch_size, time.monotonic() - begin)

        begin = time.monotonic()
        self.metrics.direct.inc()
        try:
            answer = await served.draw(request, self.config.timeout_s, on_progress=on_progress)
        finally:
            self.metrics.direct.dec()
        if not isinstance(answer, Refusal):
            self.metrics.video_done(served.name, request, time.monotonic() - begin)
        elif answer.reason == "timeout":  # it tells what was left, where a replica was lost before
            message = (
                f"the video was not done within {self.config.timeout_s:g} s, its waiting included: ask for fewer "
                "frames or steps, or for a job (POST /v1/videos)"
            )
            return Refusal(reason="timeout", message=message)
        return answer

    async def with_given(self, request: VideoRequest, body: VideoBody, file: Upload | None) -> VideoRequest:
        """The request with the frames that a client gave as ``input_reference``, if any."""
        reference, count = body.input_reference, body.num_given
        if file is None and reference is not None:
            file = _data_of(reference.image_url if isinstance(reference, ImageReference) else reference)
        if file is None:
            if count is not None:
                raise BadRequestError("num_given is of an input_reference, and there is none", "num_given")
            return request
        if request.size.num_frames == 1:
            raise BadRequestError(
                "input_reference: an image cannot go on with a picture: ask for 5 frames or more", "input_reference"
            )
        head = file.data[:16]
        is_picture = head[4:8] == b"ftyp" and head[8:12].decode("latin-1") in IMAGE_BRANDS
        is_clip = file.kind.startswith("video/") or (not is_picture and any(mark in head for mark in _CLIPS))
        read: Any = read_clip if is_clip else read_image
        if count is not None:
            _check_count(count, request.size.num_frames, is_clip=is_clip)
            read = partial(read_clip, num_given=count) if is_clip else read_image
        given = await self._read("input_reference", read, file.data, request.size)
        try:
            return replace(request, given=given)
        except ValueError as error:
            raise BadRequestError(f"input_reference: {error}", "input_reference") from error

    async def of_upload(
        self, body: ExtensionBody, served: Served, file: Upload
    ) -> tuple[VideoRequest, NDArray[np.uint8]]:
        """A clip to go on with: what would have been asked for to get it, and its last frames."""
        plain = VideoBody.model_validate({"prompt": body.prompt, "seed": body.seed})
        try:
            first = to_request(plain, served, self.config)
        except BadRequestError as error:
            if served.card.folder.default_size is not None or error.field in ("prompt", "seed"):
                raise
            raise BadRequestError(
                f"video: {served.name} names no size that a clip could be brought to; send the clip as the "
                "input_reference of POST /v1/videos, which takes size, num_frames and fps",
                "video",
            ) from error
        # So much must be possible before a clip is decoded.
        _, most = extended(body, first, _ANY_FRAMES, served, self.config)
        # Of a longer clip, that is how many frames a video of this length would begin with.
        longest = 2 * most + TEMPORAL_FACTOR - 1
        frames = await self._read("video", read_clip, file.data, replace(first.size, num_frames=longest))
        return first, frames

    async def _read(self, field: str, read: Any, data: bytes, size: VideoSize) -> NDArray[np.uint8]:
        loop = asyncio.get_running_loop()
        try:
            frames: NDArray[np.uint8] = await loop.run_in_executor(self._decoders, read, data, size, _LIMITS)
        except GivenError as error:
            remedy = f"; {_REMEDIES[field]}" if isinstance(error, OtherKindError) else ""
            raise BadRequestError(f"{field}: {error}{remedy}", field) from error
        return frames


def _check_count(count: int, num_frames: int, *, is_clip: bool) -> None:
    """Raise a ``BadRequestError`` if a video of so many frames cannot begin with ``count`` of a picture or a clip."""
    if not is_clip and count != 1:
        raise BadRequestError(f"num_given is {count}, and a picture is 1 frame: leave it out", "num_given")
    if count % TEMPORAL_FACTOR != 1 or count >= num_frames:
        raise BadRequestError(
            f"num_given is {count}, and must be 1 + 4k and less than the {num_frames} frames of the video", "num_given"
        )


def _data_of(url: str) -> Upload:
    """The bytes and the media type of a ``data:`` URL; whatever else is refused, and never fetched."""
    match = _DATA_URL.match(url[:200])
    if match is None or not match[2].lower().endswith(";base64"):
        raise BadRequestError(
            f"input_reference: {url!r:.60} is no data: URL with base64; no other is fetched: send the file itself",
            "input_reference",
        )
    kind = match[1].lower()
    if kind and not kind.startswith(("image/", "video/", "application/octet-stream")):
        raise BadRequestError(f"input_reference: {kind!r:.60} is neither a picture nor a video", "input_reference")
    try:
        return Upload(base64.b64decode(url[match.end() :], validate=True), kind)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"input_reference: its base64 is damaged ({error})", "input_reference") from error


async def body_of(kind: type[BodyT], request: Request) -> tuple[BodyT, Upload | None]:
    """A request's body, JSON or multipart, and the file in it.

    Raises:
        BadRequestError: if it is neither, or not of its kind.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        return parse_json(kind, await request.body()), None
    if content_type != "multipart/form-data":
        found = f"is {content_type!r:.60}" if content_type else "is missing"
        raise BadRequestError(f"Content-Type {found}: send application/json or multipart/form-data", status=415)
    try:
        async with request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_PART) as form:
            body, file = parse_form(kind, form)
            return body, Upload(await file.read(), file.content_type or "") if file is not None else None
    except (HTTPException, MultiPartException, UnicodeError, ValueError) as error:
        text = str(getattr(error, "detail", "") or getattr(error, "message", "") or error)
        raise BadRequestError(f"the body is not valid multipart/form-data: {text}") from error


def refuse(refusal: Refusal) -> JSONResponse:
    """The answer that a refusal makes."""
    status = STATUS[refusal.reason]
    headers = {"Retry-After": str(max(1, math.ceil(refusal.retry_after_s)))} if status == 503 else None
    return error_answer(status, refusal.message, code=refusal.reason, headers=headers)


def error_answer(
    status: int, message: str, *, code: str | None = None, field: str | None = None, headers: Any = None
) -> JSONResponse:
    """The answer of an error, in its one form."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    detail = ErrorDetail(message=message, type=kind, code=code or kind, param=field, field=field)
    return JSONResponse(ErrorBody(error=detail).model_dump(exclude_none=True), status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Give every error one form, and bad bodies the status 400."""

    @app.exception_handler(BadRequestError)
    async def bad_request(_: Request, error: BadRequestError) -> JSONResponse:
        return error_answer(error.status, str(error), field=error.field)

    @app.exception_handler(TooManyJobsError)
    async def too_many(_: Request, error: TooManyJobsError) -> JSONResponse:
        return error_answer(503, str(error), code="full", headers={"Retry-After": f"{error.retry_after_s:.0f}"})

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return error_answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_query(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or None
        return error_answer(400, f"{field}: {first['msg']}, got {first.get('input')!r:.80}", field=field)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_answer(500, f"the service failed ({type(error).__name__}); its log says more")

    @app.exception_handler(OSError)
    @app.exception_handler(UserError)
    async def store_failed(_: Request, error: Exception) -> JSONResponse:
        return error_answer(503, "the store of jobs does not answer", code="store", headers={"Retry-After": "5"})
