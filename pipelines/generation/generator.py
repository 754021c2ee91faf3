"""The model in Ray Serve: replicas that hold it and batch requests, asked through a handle; they need no port.

HTTP and bulk runs stand on it, and know nothing of each other.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from pipelines.cluster import Waiting, cluster_is_ours, is_joined, lacking
from pipelines.errors import JobError, UserError
from pipelines.generation.batcher import Batcher, QueueFullError
from pipelines.generation.config import ModelRunConfig
from pipelines.generation.model import Engine, ModelCard, set_threads
from pipelines.generation.request import Refusal, VideoRequest

QUIET = {"log_level": "WARNING", "enable_access_log": False}
DEPLOYMENT_OPTIONS: dict[str, Any] = {
    "graceful_shutdown_wait_loop_s": 0.1,
    "health_check_period_s": 2.0,  # a lost replica is soon replaced
    "health_check_timeout_s": 60.0,  # a busy machine of 2 cores is not a dead replica
    "logging_config": QUIET,
}
PAUSE_S = 0.5  # after the loss of a replica, and as much longer after each further one; Serve finds out meanwhile
# Above what the batcher lets in, so that its refusals, which say when to come again, come before Serve's own queueing.
_SLACK_REQUESTS = 32
_GRACE_S = 5.0  # in which a replica tells itself that a request took too long
_ATTEMPTS = 5  # of a request whose replicas are lost: one that kills them must not do so for ever
_RESTART_S = 10.0  # about what a replica takes to come again
_UNSCHEDULED = re.compile(
    r"has (\d+) replicas that .* to be scheduled.*for each replica: (\{.*?\}), .*available: (\{.*?\})", re.DOTALL
)
_END_S = 5.0  # that a replica has for what it does, where the caller does not say


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a video is; the first of a video, with nothing done, comes when its batch begins."""

    done: int  # latent frames
    total: int
    batch_size: int  # requests drawn together
    picture: bytes | None = None  # JPEG, the last frame so far; only where pictures were asked for


OnProgress = Callable[[Progress], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request as it waits in the batcher, and whom to tell of it; called in the thread of the batch."""

    request: VideoRequest
    tell: Callable[[Progress], None] | None = None
    pictures: bool = False


class VideoGenerator:
    """A replica: loads the model, then draws batches in a thread while its event loop answers."""

    def __init__(self, card: ModelCard, config: ModelRunConfig) -> None:
        set_threads(config.replicas)
        self._engine = Engine(card.folder_here(), config.replicas)
        self._batcher: Batcher[_Asked, bytes] = Batcher(
            self._run,
            lambda asked: asked.request.kind,
            max_size=config.batch.max_size,
            wait_s=config.batch.wait_ms / 1000,
            max_queued=config.batch.max_queued,
            on_thread_start=partial(set_threads, config.replicas),
        )

    def _run(self, batch: Sequence[_Asked], abandoned: Callable[[], bool]) -> list[bytes]:
        """The files of a batch, in the batcher's thread; who wants to know is told of each latent frame."""

        def on_frame(index: int, codes: NDArray[np.int64]) -> None:
            asked = batch[index]
            if asked.tell:
                picture = self._engine.picture(codes) if asked.pictures else None
                total = asked.request.size.latent_shape[0]
                asked.tell(Progress(done=len(codes), total=total, batch_size=len(batch), picture=picture))

        for asked in batch:
            if asked.tell:
                asked.tell(Progress(done=0, total=asked.request.size.latent_shape[0], batch_size=len(batch)))
        return self._engine.run([asked.request for asked in batch], abandoned, on_frame)

    async def stream(
        self, request: VideoRequest, timeout_s: float | None = None, pictures: bool = False
    ) -> AsyncIterator[Progress | bytes | Refusal]:
        """How a video comes along, and last its file, or why there is none."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Progress | bytes | Refusal] = asyncio.Queue()

        def tell(progress: Progress) -> None:
            loop.call_soon_threadsafe(events.put_nowait, progress)

        asked = _Asked(request=request, tell=tell, pictures=pictures)

        async def work() -> None:
            events.put_nowait(await self._generate(asked, timeout_s))

        task = asyncio.create_task(work())
        try:
            while True:
                event = await events.get()
                yield event
                if not isinstance(event, Progress):
                    return
        finally:
            task.cancel()

    async def generate(self, request: VideoRequest, timeout_s: float | None = None) -> bytes | Refusal:
        """The file of a video, or why there is none."""
        return await self._generate(_Asked(request=request), timeout_s)

    async def _generate(self, asked: _Asked, timeout_s: float | None) -> bytes | Refusal:
        try:
            asked.request.encode(self._engine.encoder)  # so that a bad request cannot spoil its batch
        except ValueError as error:
            return Refusal(reason="invalid", message=str(error))
        try:
            return await self._batcher.submit(asked, timeout_s=timeout_s)
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


async def ask(
    generator: DeploymentHandle[VideoGenerator],
    request: VideoRequest,
    timeout_s: float | None = None,
    *,
    on_progress: OnProgress | None = None,
    pictures: bool = False,
) -> bytes | Refusal:
    """The file of a video; asked for again where its replica was lost on the way, which changes nothing in it.

    ``timeout_s`` is the longest to wait for an answer, however often it is asked for. ``on_progress`` is told of each
    latent frame, with a picture if ``pictures``; from the beginning once more where the request is asked again.
    """
    clock = asyncio.get_running_loop().time
    deadline = None if timeout_s is None else clock() + timeout_s
    lost: Refusal | None = None
    try:
        # While no replica runs, Serve would wait for ever.
        async with asyncio.timeout_at(None if deadline is None else deadline + _GRACE_S) as limit:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    answer = await _ask_once(generator, request, deadline and deadline - clock(), on_progress, pictures)
                except BackPressureError as error:
                    return Refusal(reason="full", message=str(error), retry_after_s=1.0)
                except (RayError, RayServeException) as error:
                    message = f"the process of the model was lost, and no other answered ({type(error).__name__})"
                    lost = Refusal(reason="lost", message=message, retry_after_s=_RESTART_S)
                    limit.reschedule(deadline)  # no replica that would tell by itself has the request now
                    await asyncio.sleep(PAUSE_S * attempt)
                else:
                    timed_out = isinstance(answer, Refusal) and answer.reason == "timeout"
                    return lost if lost and timed_out else answer
    except TimeoutError:
        pass
    return lost or Refusal(reason="timeout", message=f"no process of the model answered within {timeout_s:g} s")


async def _ask_once(
    generator: DeploymentHandle[VideoGenerator],
    request: VideoRequest,
    timeout_s: float | None,
    on_progress: OnProgress | None,
    pictures: bool,
) -> bytes | Refusal:
    if on_progress is None:
        answer: bytes | Refusal = await generator.generate.remote(request, timeout_s)
        return answer
    events: Any = generator.options(stream=True).stream.remote(request, timeout_s, pictures)
    last: Progress | bytes | Refusal | None = None
    try:
        async for event in events:
            last = event
            if isinstance(event, Progress):
                await on_progress(event)
    except BaseException:
        events.cancel()  # whoever asked has gone: the replica is to stop
        raise
    if last is None or isinstance(last, Progress):
        raise RayServeException("the replica ended its answer before the video")
    return last


def replica_capacity(config: ModelRunConfig) -> int:
    """Requests that Serve may have at one replica."""
    return config.batch.max_queued + config.batch.max_size + _SLACK_REQUESTS


def generator_deployment(
    card: ModelCard,
    config: ModelRunConfig,
    *,
    name: str = "generator",
    max_replicas: int | None = None,
    end_s: float = _END_S,
) -> serve.Application:
    """The replicas, for use through a handle; up to ``max_replicas`` of them as requests queue, if that is given.

    One that is replaced, or no longer needed, has ``end_s`` for the requests that it holds.
    """
    capacity, replicas = replica_capacity(config), config.replicas
    number: dict[str, Any] = {"num_replicas": replicas.num_replicas}
    if max_replicas is not None:
        number = {
            "autoscaling_config": {
                "min_replicas": replicas.num_replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": 2 * config.batch.max_size,  # one batch runs, one waits
                "upscale_delay_s": 5.0,
                "downscale_delay_s": 120.0,
            }
        }
    deployment = serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        max_ongoing_requests=capacity,
        max_queued_requests=capacity * (max_replicas or replicas.num_replicas),
        max_constructor_retry_count=1,  # a model that does not load will not load later
        graceful_shutdown_timeout_s=end_s,
        **number,
        **DEPLOYMENT_OPTIONS,
    )(VideoGenerator)
    return deployment.bind(card, config)


@contextmanager
def generator_application(card: ModelCard, config: ModelRunConfig) -> Iterator[DeploymentHandle[Any]]:
    """The model's replicas behind a handle, without HTTP; gone after the block.

    Serve's controller stays: it holds no CPU, and other applications may use it.
    """
    check_resources(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    name = f"lumos-generate-{uuid.uuid4().hex[:8]}"
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=QUIET)
    interrupted = False
    try:
        yield run_application(name, None, generator_deployment(card, config))
    except KeyboardInterrupt:  # a person waits
        interrupted = True
        raise
    finally:
        if not (interrupted and cluster_is_ours()):  # which ends with all that runs there
            serve.delete(name, _blocking=not interrupted)


def run_application(name: str, route_prefix: str | None, application: serve.Application) -> DeploymentHandle[Any]:
    """Start a Serve application and wait until it is up; a ``JobError`` if the model does not start.

    Says what it waits for where other jobs hold what its replicas reserve.
    """
    try:
        with Waiting(partial(_room_wanted, name), partial(click.echo, err=True)):
            return serve.run(application, name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        status = serve.status().applications.get(name)
        reasons = [d.message for d in status.deployments.values() if d.message] if status else []
        raise JobError("the model did not start: " + ("\n".join(reasons) or str(error))) from error


def _room_wanted(name: str) -> str:
    """What replicas of an application wait for before they can start; as Serve tells it, after half a minute."""
    application = serve.status().applications.get(name)
    for deployment in application.deployments.values() if application else ():
        found = _UNSCHEDULED.search(deployment.message)
        if found and "STARTING" in deployment.replica_states:
            number, each, free = found.groups()
            return f"room for {number} of the replicas, {each} each (free: {free})"
    return ""


def start_failure(name: str) -> str | None:
    """Why an application has no replica any more: Serve tried to start others, several times, and none did."""
    application = serve.status().applications.get(name)
    for deployment in application.deployments.values() if application else ():
        failed = (deployment.status, deployment.status_trigger) == ("UNHEALTHY", "REPLICA_STARTUP_FAILED")
        if failed and "RUNNING" not in deployment.replica_states:
            return deployment.message.strip().rpartition("\n")[2]
    return None


def check_resources(config: ModelRunConfig) -> None:
    """Refuse what there is not, as Serve would wait for ever; a joined cluster may grow, if the config says so."""
    if config.cluster.autoscaling and is_joined():
        return
    replicas = config.replicas
    lack = lacking([{"CPU": replicas.num_cpus, "GPU": replicas.num_gpus}] * replicas.num_replicas)
    if lack:
        raise UserError(
            f"replicas: {replicas.num_replicas} replicas of num_cpus {replicas.num_cpus:g} and num_gpus "
            f"{replicas.num_gpus:g} need {lack}: reserve less, or "
            + (
                "set cluster.autoscaling=true if machines are added for what waits"
                if is_joined()
                else "join a cluster (RAY_ADDRESS)"
            )
        )
