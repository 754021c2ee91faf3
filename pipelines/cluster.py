"""Joining a Ray cluster, or starting a quiet one on this machine."""

import logging
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ray.util import placement_group_table

from pipelines.config import ClusterConfig
from pipelines.cores import usable_cores
from pipelines.errors import JobError, UserError, in_words
from pipelines.storage import is_local

# Train workers, Serve replicas and coordinating actors hold a CPU while they mostly wait for each other. With only as
# many as there are cores, two of them on two cores would leave none for Ray Data, and the job would stand still.
_SPARE_CPUS = 4

# What workers print would tear the progress bars apart (Ray Train's own helpers print every second where the dashboard
# is off). Their errors reach the driver as exceptions; their output is in the logs of Ray's session folder.
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}

_ours = False  # whether the cluster was started by this process
_usual = False  # whether it has the number of CPUs that it has by default


def is_joined() -> bool:
    """Whether ``connect`` joins a cluster, or did, instead of starting one here."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local") or (ray.is_initialized() and not _ours)


def cluster_is_ours() -> bool:
    """Whether Ray runs on a cluster that ``connect`` started here, which never grows."""
    return _ours


@contextmanager
def connect(num_cpus: int | None = None, *, metrics: bool = True) -> Iterator[None]:
    """Be connected to Ray within the block.

    An existing connection is used as it is. Else the cluster that ``RAY_ADDRESS`` names is joined (``ray job submit``
    sets it). Else a cluster of this process alone is started here, whatever others run on this machine, and stopped
    at the end of the block.

    Args:
        num_cpus: CPUs the local cluster declares; may exceed the cores. Default: the cores and a few more. A cluster
            that is joined keeps its own.
        metrics: Whether a local cluster has its counts read by Prometheus, from a port that asks for no token and
            that all on the network can reach.

    Raises:
        UserError: if ``RAY_ADDRESS`` names a cluster that cannot be reached.
        JobError: if none can be started here.
    """
    global _ours, _usual
    if ray.is_initialized():
        yield
        return
    if is_joined():
        _join(os.environ["RAY_ADDRESS"])
    else:
        # A token guards Ray's job API, which is off here: its warning would only puzzle.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        declared = num_cpus if num_cpus is not None else usable_cores() + _SPARE_CPUS
        try:
            ray.init(
                address="local",
                num_cpus=declared,
                include_dashboard=False,
                _system_config={"enable_metrics_collection": metrics},
                **_QUIET,
            )
        except Exception as error:  # of several kinds, a bare Exception where its processes are not up in time
            ray.shutdown()
            raise JobError(
                f"Ray could not start on this machine ({in_words(error)}): it needs free cores and memory, and room "
                "in /tmp; then the same command continues"
            ) from error
        _ours, _usual = True, num_cpus is None
    try:
        yield
    finally:
        _ours = _usual = False
        ray.shutdown()


@contextmanager
def joining(paths: Mapping[str, str | None], config: ClusterConfig) -> Iterator[None]:
    """Be connected within the block where a cluster is joined, once it can use the paths; else as without.

    Args:
        paths: by their keys, those that several machines read, or that must outlive the one where this process runs.
        config: of the run.

    Raises:
        UserError: if the cluster has several machines, or is given more, and a path is one of a single machine.
        JobError: if a failure within the block is that of such a path, as a machine was added meanwhile.
    """
    if not is_joined():
        yield
        return
    local = {key: path for key, path in paths.items() if path and is_local(path) and not config.shared_paths}
    named = ", ".join(f"{key} = {path}" for key, path in local.items())
    instead = "Name s3:// URIs; or set cluster.shared_paths=true, if all of them share these folders"
    with connect():
        machines = _machines()
        if local and config.autoscaling and machines == 1:
            raise UserError(f"{named}: a path of one machine, and cluster.autoscaling says that more come. {instead}")
        if local and machines > 1:
            raise UserError(f"{named}: a path of one machine, and this cluster has {machines}. {instead}")
        try:
            yield
        except (JobError, UserError) as error:
            if local and _machines() > 1:
                raise JobError(
                    f"{named}: a path of one machine, and another was added to this cluster, which does not have it "
                    f"({error}). {instead}"
                ) from error
            raise


def _machines() -> int:
    return len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})


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
    return max(1, min(declared, usable_cores()) if alone else declared)


def lacking(processes: Sequence[Mapping[str, float]]) -> str:
    """What the cluster as it is now lacks to run processes side by side, each on one node.

    Each reserves CPU, GPU and memory (bytes). The answer is for a person, as "36 CPU (there is 3)", and empty where
    nothing is lacking. Before ``connect``, only CPUs can be told of, and only of a cluster that is started here.
    """
    here = _usual
    if ray.is_initialized():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    elif is_joined():
        return ""
    else:
        here, nodes = True, [{"CPU": usable_cores() + _SPARE_CPUS}]
        processes = [{"CPU": needs.get("CPU", 0.0)} for needs in processes]
    because = f": {usable_cores()} cores, and {_SPARE_CPUS} for processes that mostly wait" if here else ""
    found = []
    for name in dict.fromkeys(name for needs in processes for name in needs):
        needed = [needs.get(name, 0.0) for needs in processes]
        there = [node.get(name, 0.0) for node in nodes]
        why = because if name == "CPU" else ""
        if sum(needed) > sum(there):
            found.append(f"{sum(needed):g} {name} (there is {sum(there):g}{why})")
        elif max(needed) > max(there):
            found.append(f"{max(needed):g} {name} on one node (there is {max(there):g}{why})")
    return ", ".join(found)


class Waiting:
    """Within a block, says what is waited for while other jobs hold it; in a thread of its own."""

    def __init__(self, wanted: Callable[[], str], say: Callable[[str], None], *, first_s: float = 15.0) -> None:
        """``wanted`` tells it in words, "" for nothing; ``say`` shows a line to the user, once a minute."""
        self._wanted, self._say, self._first = wanted, say, first_s
        self._come, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="waiting", daemon=True)

    def over(self) -> None:
        """It has come; where it is lost again, as with a node, that is said likewise."""
        self._come.set()

    @property
    def is_over(self) -> bool:
        """Whether it has, and is not waited for again."""
        return self._come.is_set()

    def __enter__(self) -> "Waiting":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _follow(self) -> None:
        begin, pause = time.monotonic(), self._first
        while not self._end.wait(pause):
            wanted = self._wanted()
            pause = 4 * self._first if wanted else self._first
            if not wanted:
                begin = time.monotonic()
                continue
            self._come.clear()
            self._say(
                f"waiting for {wanted}, for {time.monotonic() - begin:.0f} s now and until it is there: other jobs "
                "hold it, or machines are being added"
            )


def held_by_others(processes: Sequence[Mapping[str, float]]) -> str:
    """What is not free of that which processes reserve, as in :func:`lacking`, while a group of this job waits."""
    job = ray.get_runtime_context().get_job_id()  # an id ends with that of its job
    groups = [group for group in placement_group_table().values() if group["placement_group_id"].endswith(job)]
    if not any(group["state"] in ("PENDING", "RESCHEDULING") for group in groups):
        return ""
    free, there = ray.available_resources(), ray.cluster_resources()
    needed: Counter[str] = Counter()
    for needs in processes:
        needed.update(needs)
    return ", ".join(
        f"{amount:g} {name} ({free.get(name, 0.0):g} free of {there.get(name, 0.0):g})"
        for name, amount in needed.items()
        if amount > free.get(name, 0.0)
    )
