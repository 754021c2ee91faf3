"""Ray tasks over partitions of something large: as many at a time as there are cores, their results in order."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from pipelines.cluster import cluster_cores
from pipelines.errors import JobError

_FEW_BYTES = 64 << 20  # below which a worker that starts takes longer than the work


def is_worth_tasks(size: float) -> bool:
    """Whether so many bytes of work are to be dealt to Ray's workers, rather than done in this process."""
    return size >= _FEW_BYTES and ray.is_initialized()


def store_bytes() -> float:
    """Of memory that Ray's workers share, on all nodes together; infinitely many where there are no workers."""
    return float(ray.cluster_resources().get("object_store_memory", 0)) if ray.is_initialized() else math.inf


def run_tasks(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *, remote: bool) -> Iterator[Any]:
    """What a function gives for each list of arguments, in their order; a few of these are drawn ahead.

    Ray's references among the arguments arrive as what they stand for. A worker that dies is replaced.

    Args:
        function: To be called; it must do no harm when it is called again.
        calls: Arguments.
        remote: Whether in Ray's workers, else one after another in this process.

    Raises:
        JobError: workers died again and again. What the function raises is raised as it was.
    """
    for references in start_tasks(function, calls, remote=remote, num_returns=1):
        yield fetch(references[0])


def start_tasks(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *, remote: bool, num_returns: int
) -> Iterator[list[Any]]:
    """Likewise of a function that gives several things: references to them where it runs remotely.

    They come once the call is done, so that no more are under way than there are cores.
    """
    if not remote:
        for arguments in calls:
            value = function(*arguments)
            yield [value] if num_returns == 1 else list(value)
        return
    task = ray.remote(num_returns=num_returns, num_cpus=1)(function)
    most = cluster_cores()
    ahead: deque[list[Any]] = deque()
    for arguments in calls:
        made = task.remote(*arguments)
        ahead.append([made] if num_returns == 1 else made)
        if len(ahead) >= most:
            yield _done(ahead.popleft())
    while ahead:
        yield _done(ahead.popleft())


def _done(references: list[Any]) -> list[Any]:
    ray.wait(references[:1], fetch_local=False)
    return references


def fetch(reference: Any) -> Any:
    """What a reference stands for, or the error of the task that was to make it; what is none stands for itself."""
    if not isinstance(reference, ray.ObjectRef):
        return reference
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise JobError(
            f"a worker was lost ({type(error).__name__}: {str(error).splitlines()[0]}); what was written is kept: give "
            "the same command again to continue"
        ) from error
