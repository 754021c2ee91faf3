"""Joining a Ray cluster, or starting a quiet one on this machine."""

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

# Ray reads these when it is imported or starts its processes, so they are set before.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its coming default; silences a warning per worker
# Ray's core tells of every pool of actors, as an error, that what they are made with is in its store, as it always is
# with Ray Data. What ends a job reaches the driver as an exception all the same. Ray says in one line that this is set.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin starve the others on a busy machine

import ray

from pipelines.errors import UserError

# Train workers, Serve replicas and coordinating actors hold a CPU while they mostly wait for each other. With only as
# many as there are cores, two of them on two cores would leave none for Ray Data, and the job would stand still.
_SPARE_CPUS = 4

# What workers print would tear the progress bars apart (Ray Train's own helpers print every second where the dashboard
# is off). Their errors reach the driver as exceptions; their output is in the logs of Ray's session folder.
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}

_ours = False  # whether the cluster was started by this process


def is_joined() -> bool:
    """Whether ``connect`` joins a cluster, or did, instead of starting one here."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local") or (ray.is_initialized() and not _ours)


def cluster_is_ours() -> bool:
    """Whether Ray runs on a cluster that ``connect`` started here, which never grows."""
    return _ours


@contextmanager
def connect(num_cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray within the block.

    An existing connection is used as it is. Else the cluster that ``RAY_ADDRESS`` names is joined (``ray job submit``
    sets it). Else a cluster of this process alone is started here, whatever others run on this machine, and stopped
    at the end of the block.

    Args:
        num_cpus: CPUs the local cluster declares; may exceed the cores. Default: the cores and a few more. A cluster
            that is joined keeps its own.

    Raises:
        UserError: if ``RAY_ADDRESS`` names a cluster that cannot be reached.
    """
    global _ours
    if ray.is_initialized():
        yield
        return
    if is_joined():
        _join(os.environ["RAY_ADDRESS"])
    else:
        # A token guards Ray's job API, which is off here: its warning would only puzzle.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        declared = num_cpus if num_cpus is not None else _cores() + _SPARE_CPUS
        ray.init(address="local", num_cpus=declared, include_dashboard=False, **_QUIET)
        _ours = True
    try:
        yield
    finally:
        _ours = False
        ray.shutdown()


def _join(address: str) -> None:
    host_and_port = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    try:
        if host_and_port:  # where nobody listens, ray.init would try for minutes
            host, port = host_and_port.groups()
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, **_QUIET)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"RAY_ADDRESS={address}: cannot join that cluster ({error}); check the address and the token "
            "(RAY_AUTH_MODE), or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def cluster_cores() -> int:
    """CPUs worth using: what the cluster declares, but on this machine alone no more than it has cores."""
    declared = int(ray.cluster_resources().get("CPU", 1))
    alone = len([node for node in ray.nodes() if node["Alive"]]) == 1
    return max(1, min(declared, _cores()) if alone else declared)


def lacking(processes: Sequence[Mapping[str, float]]) -> str:
    """What the cluster as it is now lacks to run processes side by side, each on one node.

    Each reserves CPU, GPU and memory (bytes). The answer is for a person, as "36 CPU (there is 3)", and empty where
    nothing is lacking.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = []
    for name in dict.fromkeys(name for needs in processes for name in needs):
        needed = [needs.get(name, 0.0) for needs in processes]
        there = [node.get(name, 0.0) for node in nodes]
        if sum(needed) > sum(there):
            found.append(f"{sum(needed):g} {name} (there is {sum(there):g})")
        elif max(needed) > max(there):
            found.append(f"{max(needed):g} {name} on one node (there is {max(there):g})")
    return ", ".join(found)


def _cores() -> int:
    """Cores this process may run on, which in a container or under taskset are fewer than the machine's."""
    return len(os.sched_getaffinity(0))
