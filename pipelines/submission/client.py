"""The cluster from this side: its address, its token, and whether it runs what this side runs."""

import logging
import os
import platform
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobSubmissionClient

from pipelines.errors import JobError, UserError, in_words

_ADDRESS, _BOOTSTRAP = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"  # read by Ray, in this order
_TIMEOUT_S = (10.0, 60.0)  # to connect, and to wait for an answer; Ray itself would wait for ever
_NODES_ATTEMPTS = 20  # a second apart


for _chatty, _level in (
    ("ray.dashboard.modules.dashboard_sdk", logging.WARNING),
    ("ray.dashboard.modules.job.sdk", logging.WARNING),
    ("ray._private.runtime_env.packaging", logging.WARNING),
    ("ray._private.authentication", logging.ERROR),  # it speaks of the cluster that is not started here
):
    logging.getLogger(_chatty).setLevel(_level)


class JobClient(JobSubmissionClient):
    """Ray's client of a cluster's jobs, whose requests do not wait for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        options.setdefault("timeout", _TIMEOUT_S)
        return super()._do_request(method, endpoint, **options)

    def ask(self, endpoint: str) -> Any:
        """The JSON that the dashboard answers; None where it has no such answer."""
        response = self._do_request("GET", endpoint)
        return response.json() if response.status_code == 200 else None

    def job(self, job_id: str) -> JobDetails:
        """A job as it is now; a ``JobError`` if the cluster does not know it (any more)."""
        try:
            return self.get_job_info(job_id)
        except RuntimeError as error:
            if "status code 404" in str(error):
                raise JobError(f"{shown_address(self)} knows no job {job_id}: was the cluster started anew?") from error
            raise


@dataclass(frozen=True)
class Versions:
    """What runs somewhere."""

    ray: str
    python: str

    @property
    def comparable(self) -> tuple[str, str]:
        """What must be equal here and there: Ray's version, and Python's without its last part."""
        return self.ray, ".".join(self.python.split(".")[:2])

    def __str__(self) -> str:
        return f"Ray {self.ray} on Python {self.python}"


def open_client(address: str | None) -> JobClient:
    """Reach a cluster.

    Args:
        address: of its dashboard (``http://HOST:8265``), or of the cluster itself (``HOST:6379``). None:
            ``RAY_API_SERVER_ADDRESS``, else ``RAY_ADDRESS``, else one that runs on this machine, as with ``ray job``.

    Raises:
        UserError: if nobody answers, it is no Ray cluster, or the token is missing or wrong.
    """
    if address:
        os.environ.pop(_ADDRESS, None)  # Ray would take these instead
        os.environ.pop(_BOOTSTRAP, None)
    named = address or os.environ.get(_ADDRESS) or os.environ.get(_BOOTSTRAP)
    shown = _without_password(named or "") or "no address is given, and no cluster runs on this machine"
    remedy = "give the dashboard's address by --address or RAY_API_SERVER_ADDRESS, such as http://HOST:8265"
    # A token goes along wherever there is one, as `ray start` asks for one then; Ray's clients send none unasked.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        _knock(named)
        return JobClient(address)
    except AuthenticationError as error:
        raise UserError(f"{shown}: {_token_trouble(str(error))}") from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, RayError) as error:
        raise UserError(f"{shown}: {_reason(error)}; {remedy}") from error


def _knock(named: str | None) -> None:
    """Fail quickly where nobody listens at the address of a cluster, which Ray would try for long."""
    parts = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", named or "")
    if parts:
        socket.create_connection((parts[1], int(parts[2])), timeout=_TIMEOUT_S[0]).close()


def _reason(error: Exception) -> str:
    if isinstance(error, RuntimeError) and "404" in str(error):
        return "what answers there is not the dashboard of a Ray cluster"
    if isinstance(error, RayError):  # of the cluster's own protocol: the dashboard's port without http:// does so
        return f"what answers there is not a Ray cluster ({in_words(error, last_line=True)})"
    if isinstance(error, ConnectionError) and "Failed to connect to Ray" in str(error):
        return "nobody answers there"
    if isinstance(error, ValueError | KeyError | TypeError):
        return f"that is not the dashboard of a Ray cluster ({in_words(error, last_line=True)})"
    return in_words(error, last_line=True)


def _token_trouble(text: str) -> str:
    if text.startswith("Authentication required"):
        return (
            "the cluster asks for a token, and there is none here: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a "
            "file that holds it (and RAY_AUTH_MODE=token, if it is set otherwise)"
        )
    return "the cluster refuses this token: set RAY_AUTH_TOKEN (or the file of RAY_AUTH_TOKEN_PATH) to the cluster's"


def check_versions(client: JobClient) -> None:
    """Compare Ray and Python here with those of the cluster; a ``UserError`` names both sides."""
    release = (client.ask("/api/version") or {}).get("ray_version", "unknown")
    about = (client.ask("/api/v0/cluster_metadata") or {}).get("data", {})
    python = about.get("pythonVersion") or about.get("python_version")
    here = Versions(ray.__version__, platform.python_version())
    there = Versions(release, python or here.python)  # of what does not say, Ray's version alone is compared
    if here.comparable != there.comparable:
        told = there if python else f"Ray {release}"
        raise UserError(
            f"{shown_address(client)} runs {told}, here is {here}: they must be the same; install the cluster's "
            "versions here, or take an image of the cluster with these (infra/constraints.txt)"
        )


def is_this_machine(client: JobClient) -> bool:
    """Whether all nodes of the cluster are this very machine, so that its paths are the cluster's.

    By the addresses of the nodes, not by that of the dashboard, to which a port may be forwarded. What cannot be told
    counts as another machine.
    """
    mine = {each.address for listed in psutil.net_if_addrs().values() for each in listed}
    for attempt in range(_NODES_ATTEMPTS):  # a cluster that has just begun does not know its nodes
        try:
            nodes = client.ask("/api/v0/nodes")["data"]["result"]["result"]
            addresses = {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
            names = set(client.ask("/nodes?view=hostNameList")["data"]["hostNameList"])
        except (OSError, KeyError, TypeError, ValueError):
            addresses, names = set(), set()
        if addresses and names:
            return addresses <= mine and names == {socket.gethostname()}
        if attempt < _NODES_ATTEMPTS - 1:
            time.sleep(1)
    return False


def shown_address(client: JobClient) -> str:
    """The dashboard's address without a password."""
    return _without_password(client.get_address())


def _without_password(address: str) -> str:
    return re.sub(r"(?<=://)[^/@]*@", "", address)
