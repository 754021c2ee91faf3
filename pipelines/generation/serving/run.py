"""The command: a service until interrupted. And the Serve application behind HTTP, for the length of a block.

What speaks HTTP is a process of its own, so that it stays quick while a model computes.
"""

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
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
from ray.util import list_named_actors

from lumos.encoder import RequestEncoder
from pipelines import storage
from pipelines.cluster import connect, is_joined, joining
from pipelines.errors import UserError, in_words
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
from pipelines.generation.model import ModelCard, model_places, read_card
from pipelines.generation.serving.api import build_api
from pipelines.generation.serving.jobs import JobStore
from pipelines.generation.serving.observe import log_to
from pipelines.generation.serving.request_ids import PROXY_VARIABLES
from pipelines.generation.serving.requests import Served

TOKEN_VARIABLE = "LUMOS_SERVE_TOKEN"
_SERVICE = "lumos"
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"  # Ray Serve's name for its own
_END_S = 5.0  # that requests have when the service ends


def serve(config: ServeConfig) -> None:
    """Serve the model over HTTP until SIGINT (Ctrl-C) or SIGTERM.

    Raises:
        UserError: if the model cannot be used, the port is taken, or strangers could connect without a token.
        JobError: if the model does not start.
    """
    click.echo(f"loading {config.model}")
    config = with_token(config)
    if not is_joined():
        check_port(config.host, config.port)
    cards = read_cards(config)
    places = model_places(config) | {f"models.{name}": folder for name, folder in config.models.items()}
    with (
        joining({**places, "jobs": config.jobs}, config.cluster),
        connect(metrics=False),
        _ended_by_signal(),
        http_application(cards, config) as url,
    ):
        _announce(url, cards, config)
        _replace_when_told(config)


def with_token(config: ServeConfig) -> ServeConfig:
    """The config with the token of the environment where it names none, and with the place of the jobs in full.

    Raises:
        UserError: if strangers could connect without a token, or the token cannot be one.
    """
    token = (config.token or os.environ.get(TOKEN_VARIABLE) or "").strip() or None
    if token is not None and not token.isascii():
        raise UserError(f"token: holds characters that no HTTP header can; set another {TOKEN_VARIABLE}")
    if token is None and not config.is_loopback:
        raise UserError(
            f"host: {config.host} can be reached from other machines, which needs a token: set {TOKEN_VARIABLE} (or "
            "the key token), or use host 127.0.0.1"
        )
    return replace(config, token=token, jobs=jobs_folder(config.jobs))


def read_cards(config: ServeConfig) -> dict[str, ModelCard]:
    """The models of a service by name, checked; that of the key ``model`` is first, under the name of its folder."""
    first = read_card(config)
    cards = {first.folder.name: first}
    for name, folder in config.models.items():
        if name in cards:
            raise UserError(f"models: {name!r} is the name of {cards[name].folder.path} already: give another")
        cards[name] = read_card(replace(config, model=folder))
    for card in cards.values():
        _check_defaults(config, card)
    JobStore(config.jobs)  # tells at once where it cannot be used
    return cards


def jobs_folder(uri: str) -> str:
    """Where jobs are kept, whatever the working folder of the process that asks."""
    return os.path.abspath(os.path.expanduser(uri)) if storage.is_local(uri) and "://" not in uri else uri


def _replace_when_told(config: ServeConfig) -> None:
    """Wait; at each SIGHUP read the models' folders anew and let new replicas take the places of the old ones."""
    told = threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: told.set())
    while True:
        told.wait()
        told.clear()
        begun = False
        try:
            cards = read_cards(config)
            begun = True
            run_application(_SERVICE, "/", service_deployment(cards, config))
        except Exception as error:  # noqa: BLE001 (whatever is wrong with a folder, the service goes on)
            why = in_words(error, last_line=True)
            if begun:  # a new replica has taken the place of an old one, of which there may be no other
                why += "; old ones ended for it: put the folder right, or what was there back, and send SIGHUP again"
            click.echo(why if begun else f"the models stay as they were: {why}", err=True)
        else:
            click.echo("the models were read anew")


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


def _announce(url: str, cards: Mapping[str, ModelCard], config: ServeConfig) -> None:
    header = f' -H "Authorization: Bearer ${{{TOKEN_VARIABLE}%%,*}}"' if config.tokens else ""  # the first of several
    body = '{"prompt": "a red square moves left", "seed": 7}'
    logs = f"; log: {log_folder(config)}" if log_folder(config) else ""
    click.echo(
        f"serving {', '.join(cards)} at {url} (documentation: {url}/docs); Ctrl-C ends it. Jobs: {config.jobs}{logs}. "
        f"Try:\n  curl {url}/v1/videos/sync{header} -H 'Content-Type: application/json' -d '{body}' -o video.mp4"
    )


def log_folder(config: ServeConfig) -> str | None:
    """Where API processes write their logs: beside the jobs, if those are on a disk."""
    return storage.join(config.jobs, "log") if storage.is_local(config.jobs) else None


@ray_serve.ingress()
class VideoApi:
    """The HTTP side: checks requests, keeps jobs and hands them to the replicas."""

    def __init__(
        self,
        generators: Mapping[str, DeploymentHandle[VideoGenerator]],
        cards: Mapping[str, ModelCard],
        config: ServeConfig,
    ) -> None:
        self._generators, self._cards, self._config = generators, cards, config

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica."""
        store = JobStore(self._config.jobs)
        if (folder := log_folder(self._config)) is not None:
            log_to(folder, store.worker)
        # The machine that read the cards may be another one.
        folders = {name: card.folder_here() for name, card in self._cards.items()}
        models = {
            name: Served(
                name=name,
                card=card,
                encoder=RequestEncoder(folders[name]),
                draw=partial(ask, self._generators[name]),
                status=partial(_status, self._generators[name]),
                created=int(os.stat(folders[name].path).st_mtime),
            )
            for name, card in self._cards.items()
        }
        return build_api(models, self._config, store, tells_id=False)  # the proxy does


async def _status(generator: DeploymentHandle[VideoGenerator]) -> dict[str, Any]:
    while True:  # the caller sets a time
        try:
            status: dict[str, Any] = await generator.status.remote()
        except (RayError, RayServeException):
            await asyncio.sleep(PAUSE_S)
        else:
            return status


def service_deployment(cards: Mapping[str, ModelCard], config: ServeConfig) -> ray_serve.Application:
    """The replicas and the HTTP side before them.

    Serve lets requests wait unanswered, health checks too, once ``max_ongoing_requests`` are in the HTTP side. So that
    is above what it holds itself: bodies that arrive, as many requests as the replicas run and let wait, twice over,
    because those too many are on their way to a refusal, and those who watch jobs.
    """
    most = config.max_replicas or config.replicas.num_replicas
    capacity = 2 * replica_capacity(config) * most * len(cards)
    deployment = ray_serve.deployment(
        name="api",
        num_replicas=config.api_replicas,
        ray_actor_options={"num_cpus": 0},  # it waits
        max_ongoing_requests=config.max_open_bodies + capacity + 2 * config.max_jobs,
        graceful_shutdown_timeout_s=config.timeout_s,  # a direct request may take as long when it is replaced
        **DEPLOYMENT_OPTIONS,
    )(VideoApi)
    generators = {
        name: generator_deployment(
            card,
            config,
            name="generator" if place == 0 else f"generator-{place}",
            max_replicas=config.max_replicas,
            end_s=config.timeout_s,
        )
        for place, (name, card) in enumerate(cards.items())
    }
    return deployment.bind(generators, dict(cards), config)


@contextmanager
def http_application(cards: Mapping[str, ModelCard], config: ServeConfig) -> Iterator[str]:
    """The models behind HTTP; the value is the URL. Gone after the block, the port with it.

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
        controller_options={"runtime_env": {"env_vars": PROXY_VARIABLES}},  # the proxies have what it has
    )
    try:
        run_application(_SERVICE, "/", service_deployment(cards, config))
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield f"http://{host}:{config.port}"
    finally:
        _end()
        if is_joined():  # else the proxy ends with our own cluster, without Ray's warnings about its end
            ray_serve.shutdown()


def _end() -> None:
    """End the service: what it does has seconds, and not the time that it has where replicas are replaced."""
    ray_serve.delete(_SERVICE, _blocking=False)
    begin = time.monotonic()
    while _SERVICE in ray_serve.status().applications and time.monotonic() < begin + 4 * _END_S:
        time.sleep(0.1)
        if time.monotonic() > begin + _END_S:
            for actor in list_named_actors(all_namespaces=True):
                if actor["name"].startswith(f"SERVE_REPLICA::{_SERVICE}#"):
                    with suppress(ValueError):  # it ended just now
                        ray.kill(ray.get_actor(**actor))


def check_port(host: str, port: int) -> None:
    """Try to listen where the service will; a ``UserError`` if that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections do not matter
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"host: {host} is no address of this machine ({error.strerror}); give 127.0.0.1, 0.0.0.0 for all "
                    "of its addresses, or one of them"
                ) from error
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
    if _CONTROLLER not in {actor["name"] for actor in list_named_actors(all_namespaces=True)}:
        return  # nor may it be asked: it would ask the controller of a cluster that this process had before
    status = ray_serve.status()
    if status.applications:
        raise UserError(
            f"Ray Serve already runs {', '.join(sorted(status.applications))} in this cluster; end that with "
            "`serve shutdown`, or use a cluster of its own (unset RAY_ADDRESS)"
        )
    ray_serve.shutdown()
