"""The Serve application: replicas that hold the model and batch requests, and a replica that speaks HTTP.

They are apart so that bulk runs need no port, and so that HTTP stays quick while a model computes.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

# Read when torch is loaded, which in a replica happens below. Threads that wait by spinning take the cores from the
# very threads they wait for as soon as anything else runs on the machine; a batch took 10 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from pipelines.generation.api import ApiSettings, build_api
from pipelines.generation.batcher import Batcher, QueueFullError
from pipelines.generation.card import ModelCard
from pipelines.generation.config import ModelRunConfig
from pipelines.generation.engine import Engine, set_threads
from pipelines.generation.request import Refusal, Video, VideoRequest

GENERATOR = "generator"
API = "api"
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
# Above what the batcher lets in, so that its refusals, which say when to come again, come before Serve's own queueing.
_SLACK_REQUESTS = 32
_GRACE_S = 5.0  # in which a replica tells itself that a request took too long


class VideoGenerator:
    """A replica: loads the model, then draws batches in a thread while its event loop answers."""

    def __init__(self, card: ModelCard, config: ModelRunConfig) -> None:
        set_threads(config.replicas)
        self._engine = Engine(card, config.replicas)
        self._batcher: Batcher[VideoRequest, Video] = Batcher(
            self._run,
            lambda request: request.batch_kind,
            max_size=config.batch.max_size,
            wait_s=config.batch.wait_ms / 1000,
            max_queued=config.batch.max_queued,
            on_thread_start=partial(set_threads, config.replicas),
        )

    def _run(self, requests: Sequence[VideoRequest], abandoned: Callable[[], bool]) -> list[Video]:
        begin = time.monotonic()
        files = self._engine.run(requests, abandoned)
        seconds = time.monotonic() - begin
        return [Video(data=data, batch_size=len(files), run_s=seconds) for data in files]

    async def generate(self, request: VideoRequest, timeout_s: float | None = None) -> Video | Refusal:
        """A video, or why there is none."""
        try:
            request.encode(self._engine.encoder)  # so that a bad request cannot spoil its batch
        except ValueError as error:
            return Refusal(reason="invalid", message=str(error))
        try:
            return await self._batcher.submit(request, timeout_s=timeout_s)
        except QueueFullError as error:
            return Refusal(reason="full", message=str(error), retry_after_s=error.retry_after_s)
        except TimeoutError:
            return Refusal(reason="timeout", message=f"the video was not done within {timeout_s:g} s")
        except Exception as error:  # noqa: BLE001 (the batcher has logged it; the client gets the message)
            return Refusal(reason="failed", message=f"{type(error).__name__}: {error}")

    async def status(self) -> dict[str, int]:
        """Requests that wait and run; answers also while a batch runs."""
        return {"queued": self._batcher.num_queued, "running": self._batcher.num_running}

    async def check_health(self) -> None:
        """Asked by Serve, which replaces the replica if this raises or does not answer."""
        if not self._batcher.is_alive:
            raise RuntimeError("the dispatcher of the batch queue has died")


@serve.ingress()
class VideoApi:
    """The HTTP side: checks requests and hands them to the replicas."""

    def __init__(self, generator: DeploymentHandle[VideoGenerator], settings: ApiSettings) -> None:
        self._generator, self._settings = generator, settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica."""
        return build_api(self._settings, self._submit, self._status)

    async def _submit(self, request: VideoRequest) -> Video | Refusal:
        timeout_s = self._settings.timeout_s
        try:
            async with asyncio.timeout(timeout_s + _GRACE_S):  # while no replica runs, Serve would wait for ever
                answer: Video | Refusal = await self._generator.generate.remote(request, timeout_s)
        except TimeoutError:
            return Refusal(reason="timeout", message=f"no process of the model answered within {timeout_s:g} s")
        except BackPressureError as error:
            return Refusal(reason="full", message=str(error), retry_after_s=1.0)
        except (RayError, RayServeException) as error:
            return Refusal(reason="failed", message=f"the model's process was lost, ask again ({type(error).__name__})")
        return answer

    async def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self._generator.status.remote()
        return status


def build_generator(card: ModelCard, config: ModelRunConfig) -> Application:
    """The replicas alone, for use through a handle."""
    capacity = config.batch.max_queued + config.batch.max_size + _SLACK_REQUESTS
    deployment = serve.deployment(
        name=GENERATOR,
        num_replicas=config.replicas.num_replicas,
        ray_actor_options={"num_cpus": config.replicas.num_cpus, "num_gpus": config.replicas.num_gpus},
        max_ongoing_requests=capacity,
        max_queued_requests=capacity * config.replicas.num_replicas,
        max_constructor_retry_count=1,  # a model that does not load will not load later
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_timeout_s=60.0,  # a busy machine of 2 cores is not a dead replica
        logging_config=_QUIET,
    )(VideoGenerator)
    return deployment.bind(card, config)


def build_service(card: ModelCard, config: ModelRunConfig, settings: ApiSettings) -> Application:
    """The replicas and the HTTP side before them."""
    capacity = config.batch.max_queued + config.batch.max_size + _SLACK_REQUESTS
    deployment = serve.deployment(
        name=API,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},  # it waits
        max_ongoing_requests=2 * capacity * config.replicas.num_replicas,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_timeout_s=60.0,
        logging_config=_QUIET,
    )(VideoApi)
    return deployment.bind(build_generator(card, config), settings)
