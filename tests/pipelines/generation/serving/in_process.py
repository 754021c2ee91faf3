"""A whole service in this process: the real API, job store, batcher and model; no Ray, no port."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from lumos.encoder import RequestEncoder
from pipelines.generation.config import ServeConfig
from pipelines.generation.generator import Progress, VideoGenerator
from pipelines.generation.model import read_card
from pipelines.generation.request import Refusal, VideoRequest
from pipelines.generation.serving.api import build_api
from pipelines.generation.serving.jobs import JobStore
from pipelines.generation.serving.requests import Served


def served(config: ServeConfig, name: str = "export", generator: VideoGenerator | None = None) -> Served:
    card = read_card(config)
    model = generator or VideoGenerator(card, config)

    async def draw(
        request: VideoRequest, timeout_s: float | None, *, on_progress: Any = None, pictures: bool = False
    ) -> bytes | Refusal:
        async for event in model.stream(request, timeout_s, pictures):
            if not isinstance(event, Progress):
                return event
            if on_progress:
                await on_progress(event)
        raise AssertionError("no answer")

    return Served(name, card, RequestEncoder(card.folder), draw, model.status, created=1)


@asynccontextmanager
async def service_of(
    config: ServeConfig, models: Mapping[str, Served] | None = None, worker: str = ""
) -> AsyncIterator[FastAPI]:
    app = build_api(models or {"export": served(config)}, config, JobStore(config.jobs, worker))
    async with app.router.lifespan_context(app):
        yield app


def client_to(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60.0)


async def finished(client: httpx.AsyncClient, video_id: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
    """The job once it is done."""
    async with asyncio.timeout(timeout_s):
        while True:
            answer = await client.get(f"/v1/videos/{video_id}")
            assert answer.status_code == 200, answer.text
            video: dict[str, Any] = answer.json()
            if video["status"] in ("completed", "failed"):
                return video
            await asyncio.sleep(0.02)


@contextmanager
def listening(config: ServeConfig) -> Iterator[str]:
    """The service on a port of this machine, for clients that want one; the value is its URL."""
    started: Future[tuple[str, uvicorn.Server]] = Future()

    async def main() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()  # from now on connections wait, though nobody takes them yet
            app = build_api({"export": served(config)}, config, JobStore(config.jobs))
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
            started.set_result((f"http://127.0.0.1:{listener.getsockname()[1]}", server))
            await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    url, server = started.result(60)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join()
