"""The videos of a bulk run made by the replicas of a Ray cluster."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from pipelines.cluster import connect
from pipelines.errors import JobError
from pipelines.generation.bulk.plan import Job
from pipelines.generation.config import GenerateConfig
from pipelines.generation.generator import ask, generator_application, start_failure
from pipelines.generation.model import ModelCard
from pipelines.generation.request import Refusal

Store = Callable[[Job, bytes], None]

_LOOK_S = 5.0  # between looks whether there is still a replica, or may be
_LOST_ROUNDS = 6  # of asking again, each of several attempts, for a video whose replicas are lost


def make_by_replicas(config: GenerateConfig, card: ModelCard, jobs: Sequence[Job], store: Store) -> list[str]:
    """Make videos and store each; returns what went wrong, a line per video that was not made.

    Raises:
        JobError: if all replicas are lost and no other starts.
    """
    # Enough to fill a batch while another runs, and never more than the replicas' queues take.
    window = 2 * config.batch.max_size * config.replicas.num_replicas
    with connect(), generator_application(card, config) as handle:
        return asyncio.run(_drive(handle, jobs, store, window))


async def _drive(handle: DeploymentHandle[Any], jobs: Sequence[Job], store: Store, window: int) -> list[str]:
    """Send jobs to the replicas, at most ``window`` at a time."""
    places = asyncio.Semaphore(window)
    failures: list[str] = []

    async def one(job: Job) -> None:
        async with places:
            lost = 0
            while True:
                answer = await ask(handle, job.request)
                if not isinstance(answer, Refusal) or answer.reason not in ("full", "lost"):
                    break
                lost += answer.reason == "lost"
                if lost == _LOST_ROUNDS:
                    break
                await asyncio.sleep(answer.retry_after_s)  # one replica may have got more than others, or is restarted
        if isinstance(answer, Refusal):
            failures.append(f"{job.row['path']}: {answer.message}")
        else:
            store(job, answer)

    making = asyncio.ensure_future(asyncio.gather(*map(one, jobs)))
    try:
        while not (await asyncio.wait([making], timeout=_LOOK_S))[0]:
            if (why := await asyncio.to_thread(start_failure, handle.app_name)) is not None:
                raise JobError(
                    f"the model does not start again ({why}); what is made is kept: the same command continues"
                )
        await making
    finally:
        making.cancel()  # Serve would let them wait for ever
        await asyncio.gather(making, return_exceptions=True)  # else asyncio complains of what nobody asked for
    return failures
