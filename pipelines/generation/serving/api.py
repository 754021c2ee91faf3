"""The HTTP interface: its paths, bodies and errors. It knows nothing of Ray; OpenAPI is at /docs and /openapi.json."""

import asyncio
import hmac
import math
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lumos.compression import parse_size
from lumos.encoder import RequestEncoder
from pipelines.generation.config import MAX_SEED, SamplingChoice, ServeConfig
from pipelines.generation.model import ModelCard
from pipelines.generation.request import Refusal, VideoRequest, file_name
from pipelines.media import MEDIA_TYPES

_STATUS = {"full": 503, "lost": 503, "timeout": 504, "invalid": 400, "failed": 500}
_MAX_PROMPT = 10_000  # characters
_MAX_BODY = 1 << 20  # bytes
_BAD_TOKEN = "a valid bearer token is needed: Authorization: Bearer TOKEN"
_HEALTH_TIMEOUT_S = 5.0

Submit = Callable[[VideoRequest], Awaitable[bytes | Refusal]]
Status = Callable[[], Awaitable[dict[str, Any]]]


class VideoBody(BaseModel):
    """A video to make. What is left out is the service's default (see GET /v1/models)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=_MAX_PROMPT, examples=["a red square moves left on a blue background"])
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Equal seeds give equal videos; random if left out.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels.", examples=["448x256"])
    frames: int | None = Field(None, ge=1, description="1 + 4k; 1 is an image.")
    steps: int | None = Field(None, ge=1, description="Sampling steps per latent frame.")
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False, description="1 is no guidance.")
    history_ratio: float | None = Field(None, ge=0, le=1, description="Share of earlier frames hidden from later ones.")
    motion: int | None = Field(None, ge=0, le=9, description="How much is to move, if the model was trained with it.")


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    field: str | None = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class _BadRequestError(Exception):
    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def build_api(card: ModelCard, config: ServeConfig, submit: Submit, status: Status) -> FastAPI:
    """The application. ``submit`` makes the file of a video, or says why not; ``status`` must answer quickly."""
    app = FastAPI(title="Lumos-1 video generation", version="1", redoc_url=None)
    app.state.token = config.token
    app.state.bodies = _BodyReader(config.body_timeout_s, config.max_open_bodies)
    _add_error_handlers(app)
    encoder = RequestEncoder(card.folder)
    bearer = HTTPBearer(auto_error=False, description="The service's token, where one is set.")
    v1 = APIRouter(prefix="/v1", route_class=_GuardedRoute, dependencies=[Depends(bearer)])
    meanings = {
        400: "The request cannot be met; the message says why.",
        401: "The bearer token is missing or wrong.",
        408: "The body did not arrive in time.",
        413: "The body is too long.",
        503: "Too many requests are here, or the model was lost; Retry-After says when to come again.",
        504: "The video was not done in time.",
    }
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorBody, "description": meaning} for code, meaning in meanings.items()
    }
    media = {MEDIA_TYPES[config.format]: {"schema": {"type": "string", "format": "binary"}}}
    video: dict[int | str, dict[str, Any]] = {
        200: {"content": media, "description": "The file; X-Lumos-Seed and X-Lumos-Config-Hash say how it was made."}
    }

    @v1.post("/videos", response_class=Response, responses=video | errors)
    async def create_video(body: VideoBody) -> Response:
        """Make a video and answer with the file."""
        request = _to_request(body, card, config, encoder)
        answer = await submit(request)
        if isinstance(answer, Refusal):
            return _refuse(answer)
        name = file_name(request.prompt, request.seed, request.format)
        headers = {
            "X-Lumos-Seed": str(request.seed),
            "X-Lumos-Config-Hash": request.config_hash(card.identity),
            "Content-Disposition": f'inline; filename="{name}"',
        }
        return Response(answer, media_type=MEDIA_TYPES[request.format], headers=headers)

    @v1.get("/models", responses={401: errors[401]})
    async def list_models() -> dict[str, Any]:
        """The model that is served, with the defaults and limits of requests."""
        return {"data": [_describe(card, config, encoder)]}

    app.include_router(v1)

    @app.get("/healthz", responses={503: {"model": ErrorBody, "description": "The model does not answer."}})
    async def health() -> dict[str, Any]:
        """Whether the model answers, and how many requests wait and run."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                return {"status": "ok", **await status()}
        except TimeoutError as error:
            raise HTTPException(503, f"the model did not answer within {_HEALTH_TIMEOUT_S:g} s") from error

    return app


class _GuardedRoute(APIRoute):
    """Turns away who may not ask, and what is too long or too slow, before FastAPI looks at a request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler behind the checks."""
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            state, headers = request.app.state, request.headers
            kind, _, given = headers.get("authorization", "").partition(" ")
            if state.token is not None:
                same = hmac.compare_digest(given.strip().encode(), state.token.encode())  # in constant time
                if kind.lower() != "bearer" or not same:
                    raise HTTPException(401, _BAD_TOKEN, {"WWW-Authenticate": "Bearer"})
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > _MAX_BODY or "transfer-encoding" in headers:
                raise HTTPException(
                    413, f"the body must be at most {_MAX_BODY} bytes, and Content-Length must tell its length"
                )
            if self.body_field is not None:
                await state.bodies.read(request)
            return await handler(request)

        return guarded


class _BodyReader:
    """Reads bodies within a deadline, and a bounded number at a time.

    When one more comes, the one that has been arriving for longest gives way. So clients that open many requests and
    never finish them keep out each other, and not those that send a whole body at once.
    """

    def __init__(self, timeout_s: float, max_open: int) -> None:
        self._timeout_s, self._max_open = timeout_s, max_open
        self._deadlines: dict[asyncio.Timeout, None] = {}  # of the bodies that are arriving, oldest first

    async def read(self, request: Request) -> None:
        """Wait for the body, which the request then keeps."""
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                if len(self._deadlines) >= self._max_open:
                    oldest = next(iter(self._deadlines))
                    if not oldest.expired():  # one whose time is just up ends by itself, with 408
                        del self._deadlines[oldest]
                        oldest.reschedule(0.0)
                self._deadlines[deadline] = None
                await request.body()
        except TimeoutError as error:
            if deadline in self._deadlines:
                raise HTTPException(
                    408, f"the body did not arrive within {self._timeout_s:g} s", {"Connection": "close"}
                ) from error
            headers = {"Connection": "close", "Retry-After": "1"}
            raise HTTPException(
                503, f"more than {self._max_open} requests are sending their bodies", headers
            ) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the client left before its body had arrived") from error
        finally:
            self._deadlines.pop(deadline, None)


def _to_request(body: VideoBody, card: ModelCard, config: ServeConfig, encoder: RequestEncoder) -> VideoRequest:
    width, height = config.video.width, config.video.height
    if body.size is not None:
        try:
            width, height = parse_size(body.size)
        except ValueError as error:
            raise _BadRequestError(str(error), "size") from error
    if body.steps is not None and body.steps > config.max_steps:
        raise _BadRequestError(f"steps is {body.steps}; this service allows at most {config.max_steps}", "steps")
    try:
        sampling = SamplingChoice(
            num_steps=body.steps, guidance_scale=body.guidance_scale, history_ratio=body.history_ratio
        )
        asked = replace(config.video, width=width, height=height, num_frames=body.frames or config.video.num_frames)
        request = VideoRequest(
            prompt=body.prompt.strip(),
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            size=encoder.size(**asdict(asked)),
            sampling=sampling.over(card.sampling),
            format=config.format,
            motion=config.motion if body.motion is None else body.motion,
        )
        request.encode(encoder)
    except ValueError as error:
        raise _BadRequestError(str(error)) from error
    return request


def _describe(card: ModelCard, config: ServeConfig, encoder: RequestEncoder) -> dict[str, Any]:
    folder, sampling = card.folder, card.sampling
    try:
        size = encoder.size(**asdict(config.video))
        defaults: dict[str, Any] = {"size": f"{size.width}x{size.height}", "frames": size.num_frames, "fps": size.fps}
    except ValueError:  # the checkpoint names no size: every request must
        defaults = {}
    defaults |= {
        "steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "history_ratio": sampling.history_ratio,
    }
    limits = {"size_multiple_of": folder.vocabulary.grid_unit, "frames": "1 + 4k", "max_steps": config.max_steps}
    limits["max_tokens"] = folder.config.max_seq_len
    return {
        "id": folder.name,
        "parameters": folder.config.num_parameters,
        "format": config.format,
        "defaults": defaults,
        "limits": limits,
        "identity": card.identity,
    }


def _refuse(refusal: Refusal) -> JSONResponse:
    status = _STATUS[refusal.reason]
    headers = {"Retry-After": str(max(1, math.ceil(refusal.retry_after_s)))} if status == 503 else None
    return _error(status, refusal.message, headers=headers)


def _error(status: int, message: str, *, field: str | None = None, headers: Any = None) -> JSONResponse:
    body = ErrorBody(error=ErrorDetail(message=message, field=field))
    return JSONResponse(body.model_dump(exclude_none=True), status, headers)


def _add_error_handlers(app: FastAPI) -> None:
    """Give every error one form, and bad bodies the status 400."""

    @app.exception_handler(_BadRequestError)
    async def bad_request(_: Request, error: _BadRequestError) -> JSONResponse:
        return _error(400, str(error), field=error.field)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or None
        if first["type"] == "json_invalid":
            return _error(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        if first["type"] == "extra_forbidden":
            known = ", ".join(VideoBody.model_fields)
            return _error(400, f"unknown field {field!r}; known: {known}", field=field)
        name = f"{field}: " if field else "the body must be a JSON object: "
        return _error(400, f"{name}{first['msg']}, got {first.get('input')!r:.80}", field=field)
