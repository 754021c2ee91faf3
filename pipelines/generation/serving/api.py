"""The HTTP interface as one application. It knows nothing of Ray; OpenAPI is at /docs and /openapi.json."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from pipelines.errors import UserError
from pipelines.generation.config import ServeConfig
from pipelines.generation.serving.answers import ERRORS, Responses, add_schema
from pipelines.generation.serving.direct import add_direct_routes, add_model_routes
from pipelines.generation.serving.guard import BodyReader, GuardedRoute, Rates, Tokens
from pipelines.generation.serving.jobs import JobStore
from pipelines.generation.serving.observe import Metrics, Observer, merged
from pipelines.generation.serving.page import add_page
from pipelines.generation.serving.requests import Served, usual_sizes
from pipelines.generation.serving.runner import JobRunner
from pipelines.generation.serving.service import Service, add_error_handlers
from pipelines.generation.serving.videos import add_video_routes

_HEALTH_TIMEOUT_S = 5.0
_THREADS = 16
_MAX_OPEN_BYTES = 256 << 20  # of bodies that are arriving
_SWAGGER = Path(fastapi_offline.__file__).parent / "static"  # the files of Swagger UI, which others fetch from a CDN


def build_api(models: Mapping[str, Served], config: ServeConfig, store: JobStore, *, tells_id: bool = True) -> FastAPI:
    """The application; the first model is the one of requests that name none. It does jobs while its lifespan lasts.

    ``tells_id``: whether it puts the request's id into answers; Ray Serve's proxy does so itself.
    """
    metrics = Metrics(store.worker, [size for served in models.values() for size in usual_sizes(served, config)])
    runner = JobRunner(store, models, config, metrics)
    service = Service(models, config, runner, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Store and decoder are waited for in threads, of which asyncio has few where there are few cores.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="store"))
        await runner.start()
        try:
            yield
        finally:
            await runner.stop()

    app = FastAPI(
        title="Lumos-1 video generation",
        version="2",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # a path that OpenAPI does not tell is 404, and not 307
    )
    app.state.tokens, app.state.rates = Tokens(config.tokens), Rates(config.rate_per_minute)
    longest = max(_MAX_OPEN_BYTES, config.max_upload_mb << 20)
    app.state.bodies = BodyReader(config.body_timeout_s, config.max_open_bodies, longest)
    add_error_handlers(app)
    v1 = APIRouter(prefix="/v1", route_class=GuardedRoute)
    add_direct_routes(v1, service)
    add_model_routes(v1, service)
    add_video_routes(v1, service)
    app.include_router(v1)
    add_page(app)
    _add_upkeep_routes(app, service)
    _add_documentation(app)
    add_schema(app, needs_token=bool(config.tokens))
    app.add_middleware(Observer, metrics=metrics, tells_id=tells_id)
    return app


def _add_upkeep_routes(app: FastAPI, service: Service) -> None:
    """Add what machines ask: whether it lives, whether it can work, and how much it does."""

    async def status() -> dict[str, Any]:
        totals = {"queued": 0, "running": 0}
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                for found in await asyncio.gather(*(served.status() for served in service.models.values())):
                    totals = {name: totals[name] + found[name] for name in totals}
        except TimeoutError as error:
            message = f"the model did not answer within {_HEALTH_TIMEOUT_S:g} s"
            raise HTTPException(503, message, {"Retry-After": "5"}) from error
        return {"status": "ok", **totals}

    unready: Responses = {503: ERRORS["read"][503], 500: ERRORS["read"][500]}

    failed: Responses = {500: unready[500]}
    text: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/health", responses=failed)
    async def health() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses=unready)
    async def ready() -> dict[str, Any]:
        """Whether the models answer, and how many requests wait and run at one replica of each."""
        return await status()

    @app.get("/healthz", responses=unready)
    async def healthz() -> dict[str, Any]:
        """As /ready, which it was called before."""
        return await status()

    guarded = APIRouter(route_class=GuardedRoute)

    @guarded.get(
        "/metrics",
        response_class=Response,
        responses=text | ERRORS["read"],
    )
    async def metrics() -> Response:
        """Counts for Prometheus, of all API processes whichever answers; those of others are seconds old."""

        async def of_all() -> list[bytes]:
            await service.runner.give_sign()
            return await asyncio.to_thread(service.runner.store.all_counts)

        try:  # a sign that is being given is given, so that counts do not go back
            counts = await asyncio.wait_for(asyncio.shield(of_all()), _HEALTH_TIMEOUT_S)
        except (OSError, UserError):  # or time is up: without the store there are its own, and they are wanted then
            counts = [service.metrics.text()]
        return Response(merged(counts), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(guarded)


def _add_documentation(app: FastAPI) -> None:
    """Swagger UI from files of the installation: it works without internet."""
    app.mount("/docs/static", StaticFiles(directory=_SWAGGER), name="swagger")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(
            openapi_url=f"{root}/openapi.json",
            title=app.title,
            swagger_js_url=f"{root}/docs/static/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/docs/static/swagger-ui.css",
            swagger_favicon_url=f"{root}/docs/static/favicon.png",
        )
