"""The command: a service until interrupted. And the Serve application behind HTTP, for the length of a block.

What speaks HTTP is a process of its own, so that it stays quick while a model computes.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

import click
import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from lumos.encoder import RequestEncoder
from pipelines.cluster import connect, is_joined
from pipelines.errors import UserError
from pipelines.generation.config import ServeConfig
from pipelines.generation.generator import (
    DEPLOYMENT_OPTIONS,
    PAUSE_S,
    QUIET,
    VideoGenerator,
    ask,
    check_resources,
    generator_deployment,
    replica_capacity,
    run_application,
)
from pipelines.generation.model import ModelCard, read_card
from pipelines.generation.request import Refusal, VideoRequest
from pipelines.generation.serving.api import build_api

TOKEN_VARIABLE = "LUMOS_SERVE_TOKEN"
_SERVICE = "lumos"


def serve(config: ServeConfig) -> None:
    """Serve the model over HTTP until SIGINT (Ctrl-C) or SIGTERM.

    Raises:
        UserError: if the model cannot be used, the port is taken, or strangers could connect without a token.
        JobError: if the model does not start.
    """
    token = (config.token or os.environ.get(TOKEN_VARIABLE) or "").strip() or None
    if token is not None and not token.isascii():
        raise UserError(f"token: holds characters that no HTTP header can; set another {TOKEN_VARIABLE}")
    if token is None and not config.is_loopback:
        raise UserError(
            f"host: {config.host} can be reached from other machines, which needs a token: set {TOKEN_VARIABLE} (or "
            "the key token), or use host 127.0.0.1"
        )
    if not is_joined():
        check_port(config.host, config.port)
    card = read_card(config)
    _check_defaults(config, card)
    service = http_application(card, replace(config, token=token))
    with connect(), _ended_by_signal(), service as url:
        _announce(url, card, needs_token=token is not None)
        threading.Event().wait()


def _check_defaults(config: ServeConfig, card: ModelCard) -> None:
    """Find defaults that cannot be met before clients do."""
    if card.sampling.num_steps > config.max_steps:
        raise UserError(
            f"max_steps: {config.max_steps} is less than the {card.sampling.num_steps} steps that requests take by "
            "default: raise it, or set sampling.num_steps (null is what the model recommends)"
        )
    complete = all(value is not None for value in asdict(config.video).values())
    if not complete and card.folder.default_size is None:
        return  # every request must then name its size
    try:
        RequestEncoder(card.folder).size(**asdict(config.video))
    except ValueError as error:
        raise UserError(f"video: {error}") from error


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block, at once and in order."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)  # one is enough: leave the clean-up alone
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nstopping")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _announce(url: str, card: ModelCard, *, needs_token: bool) -> None:
    header = f' -H "Authorization: Bearer ${TOKEN_VARIABLE}"' if needs_token else ""
    body = '{"prompt": "a red square moves left", "seed": 7}'
    click.echo(
        f"serving {card.folder.name} at {url} (documentation: {url}/docs); Ctrl-C ends it. Try:\n"
        f"  curl {url}/v1/videos{header} -H 'Content-Type: application/json' -d '{body}' -o video.mp4"
    )


@ray_serve.ingress()
class VideoApi:
    """The HTTP side: checks requests and hands them to the replicas."""

    def __init__(self, generator: DeploymentHandle[VideoGenerator], card: ModelCard, config: ServeConfig) -> None:
        self._generator, self._card, self._config = generator, card, config

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica."""
        return build_api(self._card, self._config, self._submit, self._status)

    async def _submit(self, request: VideoRequest) -> bytes | Refusal:
        return await ask(self._generator, request, self._config.timeout_s)

    async def _status(self) -> dict[str, Any]:
        while True:  # the caller sets a time
            try:
                status: dict[str, Any] = await self._generator.status.remote()
            except (RayError, RayServeException):
                await asyncio.sleep(PAUSE_S)
            else:
                return status


def service_deployment(card: ModelCard, config: ServeConfig) -> ray_serve.Application:
    """The replicas and the HTTP side before them.

    Serve lets requests wait unanswered, health checks too, once ``max_ongoing_requests`` are in the HTTP side. So that
    is above what it holds itself: bodies that arrive, and as many requests as the replicas run and let wait, twice
    over, because those too many are on their way to a refusal.
    """
    deployment = ray_serve.deployment(
        name="api",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},  # it waits
        max_ongoing_requests=config.max_open_bodies + 2 * replica_capacity(config) * config.replicas.num_replicas,
        **DEPLOYMENT_OPTIONS,
    )(VideoApi)
    return deployment.bind(generator_deployment(card, config), card, config)


@contextmanager
def http_application(card: ModelCard, config: ServeConfig) -> Iterator[str]:
    """The model behind HTTP; the value is the URL. Gone after the block, the port with it.

    Raises:
        UserError: if Serve is in use in this cluster.
    """
    check_resources(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _clear_idle_serve()
    if is_joined():
        _check_port_on_head(config.host, config.port)
    ray_serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options={"host": config.host, "port": config.port},
        logging_config=QUIET,
    )
    try:
        run_application(_SERVICE, "/", service_deployment(card, config))
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield f"http://{host}:{config.port}"
    finally:
        ray_serve.delete(_SERVICE)
        if is_joined():  # else the proxy ends with our own cluster, without Ray's warnings about its end
            ray_serve.shutdown()


def check_port(host: str, port: int) -> None:
    """Try to listen where the service will; a ``UserError`` if that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections do not matter
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise UserError(
                f"port: cannot listen on {host}:{port} ({error.strerror}); stop what uses it, or set another port"
            ) from error


def _check_port_on_head(host: str, port: int) -> None:
    """The head node, where the proxy will listen, may be another machine."""
    check = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(check_port)
    try:
        ray.get(check.remote(host, port))
    except RayTaskError as error:
        raise error.cause from None


def _clear_idle_serve() -> None:
    """Serve cannot open a port later: one that a bulk run left without applications is started anew."""
    status = ray_serve.status()
    if status.applications:
        raise UserError(
            f"Ray Serve already runs {', '.join(sorted(status.applications))} in this cluster; end that with "
            "`serve shutdown`, or use a cluster of its own (unset RAY_ADDRESS)"
        )
    ray_serve.shutdown()
