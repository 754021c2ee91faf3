"""Doing jobs: each API process asks the models for those it took in, and for those of processes that are gone."""

import asyncio
import contextlib
import io
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from pipelines.errors import UserError
from pipelines.generation.config import ServeConfig
from pipelines.generation.generator import Progress
from pipelines.generation.request import Refusal, VideoRequest
from pipelines.generation.serving.jobs import (
    REQUEST_FIELDS,
    Job,
    JobLostError,
    JobStore,
    Version,
    new_id,
    request_of,
    request_to_json,
)
from pipelines.generation.serving.observe import Metrics
from pipelines.generation.serving.pictures import joined
from pipelines.generation.serving.requests import Served

logger = logging.getLogger(__name__)

_LOOK_S = 1.0  # between looks for jobs that were deleted, here or elsewhere
_SIGN_S = 5.0  # between signs of life, and looks for jobs whose process is gone
_SWEEP_S = 300.0  # between looks for what has expired
_ATTEMPTS = 5  # of a job whose processes die: one that kills them must not do so for ever
_STORE_PAUSE_S = 2.0  # after a failure of the store
_GIVEN, _BEFORE = "given.npz", "before.bin"

T = TypeVar("T")


class TooManyJobsError(Exception):
    """As many jobs are open as may be."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} jobs are open already")
        self.retry_after_s = 5.0


@dataclass(frozen=True)
class Before:
    """A finished video that another goes on with."""

    job_id: str
    file: bytes
    num_frames: int


class JobRunner:
    """The jobs that this process does."""

    def __init__(self, store: JobStore, models: Mapping[str, Served], config: ServeConfig, metrics: Metrics) -> None:
        self.store, self._models, self._config, self._metrics = store, models, config, metrics
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unwanted_ids: set[str] = set()  # of requests that were refused: to be deleted, once the store does that
        self._closed_ids: set[str] = set()  # seen to be done: they do not change any more
        self.limit = math.ceil(config.max_jobs / config.api_replicas)  # of open jobs at this process
        self._upkeep: asyncio.Task[None] | None = None
        self._signing = asyncio.Lock()  # signs in order: what they count never goes back

    @property
    def num_open(self) -> int:
        """Jobs that this process does."""
        return len(self._tasks)

    async def start(self) -> None:
        """Begin to look after the jobs."""
        await self.give_sign()
        self._upkeep = asyncio.create_task(self._look_after())

    async def stop(self) -> None:
        """End; open jobs are left for others, or for when the service starts again."""
        tasks = [*self._tasks.values(), *([self._upkeep] if self._upkeep else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(OSError, UserError):
            await asyncio.to_thread(self.store.take_sign_away)

    async def give_sign(self) -> None:
        """Tell the others that this process is alive, and what it has counted."""
        async with self._signing:
            self._metrics.open_jobs.set(self.num_open)
            writing = asyncio.create_task(asyncio.to_thread(self.store.give_sign, self._metrics.text()))
            try:
                await asyncio.shield(writing)
            finally:  # a thread writes on where this is cancelled, and its sign would outlive the process
                await asyncio.wait([writing])

    async def submit(
        self, model: str, requests: Sequence[VideoRequest], owner: str, before: Before | None = None
    ) -> list[Job]:
        """Take in jobs, all or none.

        Raises:
            TooManyJobsError: if that would be more than may be open.
        """
        if len(self._tasks) + len(requests) > self.limit:
            raise TooManyJobsError(self.limit)
        now = time.time()
        ids = [new_id(now + place / 1000) for place in range(len(requests))]
        loop = asyncio.get_running_loop()
        for job_id in ids:
            self._tasks[job_id] = loop.create_task(asyncio.sleep(0))  # holds the place while the store is written to
        jobs = [
            Job(
                id=job_id,
                owner=owner,
                model=model,
                request=request_to_json(request),
                created_at=now,
                expires_at=now + self._config.job_expiry_s,
                worker=self.store.worker,
                attempt=1,
                total=request.size.latent_shape[0],
                ids=ids,
                config_hash=request.config_hash(self._models[model].card.identity),
                num_given=request.num_given,
                source=before.job_id if before else None,
                num_before=before.num_frames - request.num_given if before else 0,
            )
            for job_id, request in zip(ids, requests, strict=True)
        ]
        creating = loop.create_task(asyncio.to_thread(self._create, jobs, requests, before))
        try:
            versions = await asyncio.shield(creating)
        except BaseException:  # the store fails, or the client has left: it will ask again, so that none may stay
            await asyncio.wait([creating])
            self._unwanted_ids.update(ids)
            for job_id in ids:
                self._tasks.pop(job_id, None)
            with contextlib.suppress(OSError, UserError):  # else later
                await asyncio.to_thread(self._drop_unwanted)
            raise
        for version in versions:
            self._begin(version)
        return jobs

    def _create(self, jobs: Sequence[Job], requests: Sequence[VideoRequest], before: Before | None) -> list[Version]:
        """Keep jobs, the files of each first, so that whoever reads the job finds them."""
        versions = []
        for job, request in zip(jobs, requests, strict=True):
            if request.given is not None:
                buffer = io.BytesIO()
                np.savez_compressed(buffer, given=request.given)
                self.store.write_file(job.id, _GIVEN, buffer.getvalue())
            if before is not None:
                self.store.write_file(job.id, _BEFORE, before.file)
            versions.append(self.store.create(job))
        return versions

    def _drop_unwanted(self) -> None:
        for job_id in [*self._unwanted_ids]:
            self.store.delete(job_id)
            self._unwanted_ids.discard(job_id)

    async def delete(self, job_id: str) -> None:
        """Forget a job, and stop it if this process does it; one that another does stops there within seconds."""
        await asyncio.to_thread(self.store.delete, job_id)
        if task := self._tasks.get(job_id):
            task.cancel()

    def _begin(self, version: Version) -> None:
        job_id = version.job.id
        task = asyncio.get_running_loop().create_task(self._do(version), name=job_id)
        self._tasks[job_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job_id, None))

    async def _look_after(self) -> None:
        signed = swept = -math.inf
        while True:
            try:
                now = time.monotonic()
                await asyncio.to_thread(self._drop_unwanted)
                if now - signed >= _SIGN_S:
                    await self.give_sign()
                    signed = now
                    await self._look_for_free_jobs()
                if now - swept >= _SWEEP_S:
                    await asyncio.to_thread(self._drop_expired)
                    swept = now
                doing = {job_id: task for job_id, task in self._tasks.items() if task.get_name() == job_id}
                there = set(await asyncio.to_thread(self.store.ids))
                self._closed_ids &= there
                for job_id in doing.keys() - there:  # deleted, perhaps through another process
                    doing[job_id].cancel()
            except (OSError, UserError):
                logger.exception("the store of jobs fails; trying again")
                await asyncio.sleep(_STORE_PAUSE_S)
            await asyncio.sleep(_LOOK_S)

    async def _look_for_free_jobs(self) -> None:
        for job_id in await asyncio.to_thread(self.store.ids):
            if self.num_open >= self.limit:
                return
            if any(job_id in known for known in (self._closed_ids, self._unwanted_ids, self._tasks)):
                continue
            version = await asyncio.to_thread(self.store.read, job_id)
            if version is None:
                continue
            if not version.job.is_open:
                self._closed_ids.add(job_id)
                continue
            job = version.job
            if job.model not in self._models and time.time() < job.created_at + self._config.job_timeout_s:
                continue  # another service of this store may have it
            claimed = await asyncio.to_thread(self.store.claim, version)
            if claimed is not None and job_id not in self._tasks:
                logger.warning("job %s is taken up again (attempt %d)", job_id, claimed.job.attempt)
                self._begin(claimed)

    def _drop_expired(self) -> None:
        now = time.time()
        for job_id in self.store.ids():
            version = self.store.read(job_id)
            if version is not None and version.job.expires_at < now and job_id not in self._tasks:
                self.store.delete(job_id)
        self.store.sweep([*self._tasks])

    async def _do(self, version: Version) -> None:
        """Do a job until it is completed or failed, or no longer ours."""
        work = _Work(self.store, version)
        job = version.job
        served = self._models.get(job.model)
        with contextlib.suppress(JobLostError, OSError, UserError):  # of what tells its end
            try:
                if served is None:
                    await work.fail("model_not_found", f"the model {job.model!r} is no longer served")
                elif job.attempt > _ATTEMPTS:
                    await work.fail("lost", f"{_ATTEMPTS} processes that made this video ended before it was done")
                else:
                    await self._make(served, work)
            except JobLostError:
                return
            except Exception as error:  # whatever it is, the job must not stay open for ever
                logger.exception("job %s failed", job.id)
                await work.fail("failed", f"{type(error).__name__}: {error}")
            self._metrics.count_job(job.model, work.job.status)

    async def _make(self, served: Served, work: "_Work") -> None:
        """Ask the model for the video of a job, and commit it or say why there is none."""
        job = work.job
        request = await asyncio.to_thread(load_request, self.store, job)
        answer = await self._draw(served, request, work)
        if isinstance(answer, Refusal):
            await work.fail(answer.reason, answer.message)
            return
        if job.source is not None:
            answer = await asyncio.to_thread(self._join, job, request, answer)
        await work.complete(answer, request.format)

    def _join(self, job: Job, request: VideoRequest, continuation: bytes) -> bytes:
        """The video that was gone on with, and what is new."""
        before = self.store.read_file(job.id, _BEFORE)
        if before is None:
            raise FileNotFoundError("the video to go on with is gone")
        return joined(before, continuation, request.num_given, request.size.fps, request.format)

    async def _draw(self, served: Served, request: VideoRequest, work: "_Work") -> bytes | Refusal:
        """Ask until there is a place in the model's queue, or the time is over."""
        deadline = work.job.created_at + self._config.job_timeout_s
        while (left := deadline - time.time()) > 0:
            begin = time.monotonic()

            async def tell(progress: Progress, begin: float = begin) -> None:
                if progress.done == 0:
                    waited = time.monotonic() - begin
                    self._metrics.batch_began(served.name, request, progress.batch_size, waited)
                await work.tell(progress)

            answer = await served.draw(request, left, on_progress=tell, pictures=self._config.pictures)
            if not isinstance(answer, Refusal):
                self._metrics.video_done(served.name, request, time.monotonic() - begin)
                return answer
            if answer.reason == "timeout":  # it tells what was left, not what there was
                break
            if answer.reason not in ("full", "lost"):
                return answer
            await asyncio.sleep(min(max(answer.retry_after_s, 0.2), 5.0))
        message = (
            f"the video was not done within {self._config.job_timeout_s:g} s, its waiting included: ask for fewer "
            "frames or steps, or when less is going on; the service's job_timeout_s sets that time"
        )
        return Refusal(reason="timeout", message=message)


class _Work:
    """A job in our hands, and what is written of it."""

    def __init__(self, store: JobStore, version: Version) -> None:
        self._store, self._version = store, version

    @property
    def job(self) -> Job:
        return self._version.job

    async def tell(self, progress: Progress) -> None:
        if progress.picture is not None:
            name = picture_name(progress.done)
            await self._retried(lambda: self._store.write_file(self.job.id, name, progress.picture or b""))
        await self._change(status="in_progress", done=progress.done, total=progress.total)

    async def complete(self, data: bytes, suffix: str) -> None:
        """Commit the video, which is done then and for everybody; if the job is another's, nothing is left of ours."""
        name = f"video-{self.job.attempt}-{self._store.worker}.{suffix}"
        await self._retried(lambda: self._store.write_file(self.job.id, name, data))
        try:
            await self._change(status="completed", done=self.job.total, completed_at=time.time(), file=name)
        except JobLostError:
            await asyncio.to_thread(self._store.remove_file, self.job.id, name)
            raise

    async def fail(self, code: str, message: str) -> None:
        await self._change(status="failed", completed_at=time.time(), error={"code": code, "message": message})

    async def _change(self, **changes: Any) -> None:
        self._version = await self._retried(lambda: self._store.change(self._version, **changes))

    @staticmethod
    async def _retried(call: Callable[[], T]) -> T:
        """The store may be away for a while; the work is not lost for that."""
        for _ in range(30):
            try:
                return await asyncio.to_thread(call)
            except OSError:
                logger.warning("the store of jobs fails; trying again", exc_info=True)
                await asyncio.sleep(_STORE_PAUSE_S)
        return await asyncio.to_thread(call)


def picture_name(done: int) -> str:
    """The file that shows a video after so many latent frames."""
    return f"picture-{done:04d}.jpg"


def load_request(store: JobStore, job: Job) -> VideoRequest:
    """What a job asks for, with the frames given; a ``ValueError`` if a newer program asks for more."""
    if more := sorted(job.request.keys() - REQUEST_FIELDS):
        raise ValueError(f"a newer program made this job: {', '.join(more)} is not known here")
    data = store.read_file(job.id, _GIVEN)
    if data is None:
        return request_of(job)
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return replace(request_of(job), given=arrays["given"])
