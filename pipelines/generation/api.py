"""The HTTP interface: its paths, bodies and errors. It knows nothing of Ray; OpenAPI is at /docs and /openapi.json."""

import asyncio
import hmac
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from lumos.compression import parse_size
from lumos.encoder import RequestEncoder
from pipelines.generation.card import ModelCard
from pipelines.generation.config import MAX_SEED, SizeConfig, VideoFormat
from pipelines.generation.manifest import file_name
from pipelines.generation.media import MEDIA_TYPES
from pipelines.generation.request import Refusal, Video, VideoRequest

_STATUS = {"full": 503, "timeout": 504, "invalid": 400, "failed": 500}
_MAX_PROMPT = 10_000  # characters
_MAX_BODY = 1 << 20  # bytes
_BAD_TOKEN = "a valid bearer token is needed: Authorization: Bearer TOKEN"
_HEALTH_TIMEOUT_S = 5.0

Submit = Callable[[VideoRequest], Awaitable[Video | Refusal]]
Status = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """What the HTTP side is told."""

    card: ModelCard
    size: SizeConfig  # defaults of requests
    format: VideoFormat
    token: str | None
    timeout_s: float
    max_steps: int


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


def build_api(settings: ApiSettings, submit: Submit, status: Status) -> FastAPI:
    """The application.

    Args:
        settings: model, defaults, limits and token.
        submit: makes a video, or says why not.
        status: queue lengths; must answer quickly.
    """
    app = FastAPI(title="Lumos-1 video generation", version="1", redoc_url=None)
    app.add_middleware(_Gate, token=settings.token)
    _add_error_handlers(app)
    encoder = RequestEncoder(settings.card.folder)
    authorised = [Depends(_bearer_check(settings.token))]
    errors: dict[int | str, dict[str, Any]] = {
        400: {"model": ErrorBody, "description": "The request cannot be met; the message says why."},
        401: {"model": ErrorBody, "description": "The bearer token is missing or wrong."},
        413: {"model": ErrorBody, "description": "The body is too long."},
        503: {"model": ErrorBody, "description": "The queue is full; the header Retry-After says when to come again."},
        504: {"model": ErrorBody, "description": "The video was not done in time."},
    }
    media = {MEDIA_TYPES[settings.format]: {"schema": {"type": "string", "format": "binary"}}}
    video: dict[int | str, dict[str, Any]] = {
        200: {"content": media, "description": "The file; X-Lumos-Seed and X-Lumos-Config-Hash say how it was made."}
    }

    @app.post("/v1/videos", response_class=Response, responses=video | errors, dependencies=authorised)
    async def create_video(body: VideoBody) -> Response:
        """Make a video and answer with the file."""
        request = _to_request(body, settings, encoder)
        answer = await submit(request)
        if isinstance(answer, Refusal):
            return _refuse(answer)
        name = file_name(0, request.prompt, request.seed, request.format).partition("-")[2]
        headers = {
            "X-Lumos-Seed": str(request.seed),
            "X-Lumos-Config-Hash": request.config_hash(settings.card.identity),
            "Content-Disposition": f'inline; filename="{name}"',
        }
        return Response(answer.data, media_type=MEDIA_TYPES[request.format], headers=headers)

    @app.get("/v1/models", responses={401: errors[401]}, dependencies=authorised)
    async def list_models() -> dict[str, Any]:
        """The model that is served, with the defaults and limits of requests."""
        return {"data": [_describe(settings, encoder)]}

    @app.get("/healthz", responses={503: {"model": ErrorBody, "description": "The model does not answer."}})
    async def health() -> dict[str, Any]:
        """Whether the model answers, and how many requests wait and run."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                return {"status": "ok", **await status()}
        except TimeoutError as error:
            raise HTTPException(503, f"the model did not answer within {_HEALTH_TIMEOUT_S:g} s") from error

    return app


class _Gate:
    """Turns away who may not ask, and what is too long, before a body is read."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        kind, _, given = headers.get("authorization", "").partition(" ")
        if self._token is not None and not (kind.lower() == "bearer" and _is_token(given.strip(), self._token)):
            refusal = _error(401, _BAD_TOKEN, headers={"WWW-Authenticate": "Bearer"})
            return await refusal(scope, receive, send)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > _MAX_BODY or "transfer-encoding" in headers:
            refusal = _error(
                413, f"the body must be at most {_MAX_BODY} bytes, and Content-Length must tell its length"
            )
            return await refusal(scope, receive, send)
        return await self._app(scope, receive, send)


def _is_token(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())  # in constant time


def _bearer_check(token: str | None) -> Callable[..., None]:
    """For the description of the interface; `_Gate` has looked before."""
    scheme = HTTPBearer(auto_error=False, description="The service's token, where one is set.")

    def check(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if token is not None and not _is_token(credentials.credentials if credentials else "", token):
            raise HTTPException(401, _BAD_TOKEN, {"WWW-Authenticate": "Bearer"})

    return check


def _to_request(body: VideoBody, settings: ApiSettings, encoder: RequestEncoder) -> VideoRequest:
    width, height = settings.size.width, settings.size.height
    if body.size is not None:
        try:
            width, height = parse_size(body.size)
        except ValueError as error:
            raise _BadRequestError(str(error), "size") from error
    if body.steps is not None and body.steps > settings.max_steps:
        raise _BadRequestError(f"steps is {body.steps}; this service allows at most {settings.max_steps}", "steps")
    given: dict[str, Any] = {
        "num_steps": body.steps,
        "guidance_scale": body.guidance_scale,
        "history_ratio": body.history_ratio,
    }
    try:
        asked = replace(settings.size, width=width, height=height, num_frames=body.frames or settings.size.num_frames)
        request = VideoRequest(
            prompt=body.prompt.strip(),
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            size=encoder.size(**asdict(asked)),
            sampling=replace(
                settings.card.sampling, **{key: value for key, value in given.items() if value is not None}
            ),
            format=settings.format,
        )
        request.encode(encoder)
    except ValueError as error:
        raise _BadRequestError(str(error)) from error
    return request


def _describe(settings: ApiSettings, encoder: RequestEncoder) -> dict[str, Any]:
    folder, sampling = settings.card.folder, settings.card.sampling
    try:
        size = encoder.size(**asdict(settings.size))
        defaults: dict[str, Any] = {"size": f"{size.width}x{size.height}", "frames": size.num_frames, "fps": size.fps}
    except ValueError:  # the checkpoint names no size: every request must
        defaults = {}
    defaults |= {
        "steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "history_ratio": sampling.history_ratio,
    }
    limits = {"size_multiple_of": folder.vocabulary.grid_unit, "frames": "1 + 4k", "max_steps": settings.max_steps}
    limits["max_tokens"] = folder.config.max_seq_len
    return {
        "id": folder.name,
        "parameters": folder.config.num_parameters,
        "format": settings.format,
        "defaults": defaults,
        "limits": limits,
        "identity": settings.card.identity,
    }


def _refuse(refusal: Refusal) -> JSONResponse:
    headers = {"Retry-After": str(max(1, math.ceil(refusal.retry_after_s)))} if refusal.reason == "full" else None
    return _error(_STATUS[refusal.reason], refusal.message, headers=headers)


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
