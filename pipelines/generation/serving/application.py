"""Running the Serve application for the length of a block, in whatever cluster this process is connected to."""

import logging
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.config import ProxyLocation
from ray.serve.handle import DeploymentHandle

from pipelines.cluster import is_joined
from pipelines.errors import JobError, UserError
from pipelines.generation.config import ModelRunConfig, ServeConfig
from pipelines.generation.generator import build_generator, build_service
from pipelines.generation.model import ModelCard
from pipelines.generation.serving.api import ApiSettings

_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_SERVICE = "lumos"


@contextmanager
def generator_application(card: ModelCard, config: ModelRunConfig) -> Iterator[DeploymentHandle[Any]]:
    """The model's replicas behind a handle, without HTTP; gone after the block.

    Serve's controller stays: it holds no CPU, and other applications may use it.

    Raises:
        UserError: if this machine's cluster has not what the replicas reserve.
        JobError: if the model does not start.
    """
    _check_resources(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    name = f"lumos-generate-{uuid.uuid4().hex[:8]}"
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=_QUIET)
    try:
        yield _run(name, None, build_generator(card, config))
    finally:
        serve.delete(name)


@contextmanager
def http_application(card: ModelCard, config: ServeConfig, settings: ApiSettings) -> Iterator[str]:
    """The model behind HTTP; the value is the URL. Gone after the block, the port with it.

    Raises:
        UserError: if Serve is in use in this cluster, or it lacks what the replicas reserve.
        JobError: if the model does not start.
    """
    _check_resources(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _clear_idle_serve()
    if is_joined():
        _check_port_on_head(config.host, config.port)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options={"host": config.host, "port": config.port},
        logging_config=_QUIET,
    )
    try:
        _run(_SERVICE, "/", build_service(card, config, settings))
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield f"http://{host}:{config.port}"
    finally:
        serve.delete(_SERVICE)
        if is_joined():  # else the proxy ends with our own cluster, without Ray's warnings about its end
            serve.shutdown()


def check_port(host: str, port: int) -> None:
    """Try to listen where the service will.

    Raises:
        UserError: if it cannot.
    """
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


def _run(name: str, route_prefix: str | None, application: serve.Application) -> DeploymentHandle[Any]:
    try:
        return serve.run(application, name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        status = serve.status().applications.get(name)
        reasons = [d.message for d in status.deployments.values() if d.message] if status else []
        raise JobError("the model did not start: " + ("\n".join(reasons) or str(error))) from error


def _clear_idle_serve() -> None:
    """Serve cannot open a port later: one that a bulk run left without applications is started anew."""
    status = serve.status()
    if status.applications:
        raise UserError(
            f"Ray Serve already runs {', '.join(sorted(status.applications))} in this cluster; end that with "
            "`serve shutdown`, or use a cluster of its own (unset RAY_ADDRESS)"
        )
    serve.shutdown()


def _check_resources(config: ModelRunConfig) -> None:
    """Serve would wait for ever for what this machine does not have; a joined cluster may grow."""
    if is_joined():
        return
    have = ray.cluster_resources()
    replicas = config.replicas
    for key, name, each in (("num_cpus", "CPU", replicas.num_cpus), ("num_gpus", "GPU", replicas.num_gpus)):
        if each * replicas.num_replicas > have.get(name, 0.0):
            raise UserError(
                f"replicas.{key}: {replicas.num_replicas} replicas of {each:g} need {each * replicas.num_replicas:g} "
                f"{name}, Ray has {have.get(name, 0.0):g} here: reserve less, or join a cluster (RAY_ADDRESS)"
            )
