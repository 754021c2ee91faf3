"""A job from here: its log as it is written, its end, and the wish that it stop."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import aiohttp
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError

from pipelines.errors import JobError, in_words
from pipelines.submission.client import JobClient
from pipelines.submission.log_view import LogView

STOP_SECONDS = 300  # that a stopped job has to save what it must; Ray's own 3 s end a training without a checkpoint

_PATIENCE_S = 600.0  # without an answer of the dashboard, before the job is left
_STOP_PATIENCE_S = 60.0  # likewise, of a job that is stopping
_QUIET_S = 15.0  # without a line, before the dashboard is asked whether it is still there
_PAUSE_S = (0.5, 10.0)  # between attempts to reach it, the first and the longest
_TAIL_ATTEMPTS = 3  # to read the log of a job that has ended, whose node may be gone

Say = Callable[[str], None]


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    job_id: str
    status: str  # succeeded, failed or stopped
    seconds: float
    reason: str  # of a failure, in a line; empty where its own log tells it

    @property
    def succeeded(self) -> bool:
        """Whether it did what was asked."""
        return self.status == "succeeded"

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        return f"job {self.job_id} {self.status} after {duration(self.seconds)}{reason}"


def duration(seconds: float) -> str:
    """A length of time for a person."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 6000 else f"{whole / 3600:.1f} h"


def seconds_of(job: JobDetails) -> float:
    """How long a job has run, or ran; waiting for its start included."""
    end = job.end_time / 1000 if job.end_time else time.time()
    return max(0.0, end - job.start_time / 1000) if job.start_time else 0.0


def end_of(job: JobDetails) -> JobEnd:
    """The end of a job that has one."""
    code = job.driver_exit_code
    reason = ""
    if job.status.value == "FAILED":
        lines = [line for line in (job.message or "").splitlines() if line.strip()]
        reason = f"exit status {code}" if code is not None else " ".join(lines[:1] + lines[-1:] if lines[1:] else lines)
    return JobEnd(str(job.submission_id), job.status.value.lower(), seconds_of(job), reason[:500])


def follow(client: JobClient, job_id: str, view: LogView, say: Say) -> JobEnd:
    """Show a job's log until the job ends; a connection that drops is taken up where it broke.

    Args:
        client: of the cluster.
        job_id: the job.
        view: is given the log.
        say: is told what else there is to know.

    Raises:
        JobError: if the cluster does not know the job, or has not answered for ten minutes.
        KeyboardInterrupt: at Ctrl-C; the job goes on.
    """
    try:
        return asyncio.run(_Follower(client, job_id, view, say).follow())
    finally:
        view.close()


class _Follower:
    def __init__(self, client: JobClient, job_id: str, view: LogView, say: Say) -> None:
        self.client, self.job_id, self.view, self.say = client, job_id, view, say
        self.seen = 0  # characters of the log that were shown
        self.heard = time.monotonic()  # when the dashboard last answered
        self.lost = False  # whether it is told that the connection dropped
        self.pending_told = False

    async def follow(self) -> JobEnd:
        tails, pause = 0, _PAUSE_S[0]
        while True:
            whole, ended = False, None
            try:
                async with aclosing(self._pieces()) as pieces:
                    async for piece in pieces:
                        pause = _PAUSE_S[0]
                        self.view.feed(piece)
                whole = True
            except (aiohttp.ClientError, OSError, RuntimeError) as error:
                trouble: Exception = error
            try:
                ended = await self._ended()
            except (OSError, RuntimeError) as error:
                whole, trouble = False, error
            if ended is not None:
                tails += 1
                if whole:
                    return ended
                if tails >= _TAIL_ATTEMPTS:
                    self.say(f"the rest of the job's log cannot be read ({in_words(trouble, last_line=True)})")
                    return ended
            elif not whole:
                self._bear(trouble)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSE_S[1])

    async def _ended(self) -> JobEnd | None:
        """The job's end; None while it has none."""
        try:
            job = await asyncio.to_thread(self.client.job, self.job_id)
        except AuthenticationError as error:
            raise JobError(f"the cluster does not take this token any more; the job goes on: {self.job_id}") from error
        self._answered()
        if job.status.value == "PENDING" and seconds_of(job) > _QUIET_S and not self.pending_told:
            self.pending_told = True
            self.say(f"job {self.job_id} has not begun: {' '.join((job.message or 'no reason is told').split())}")
        return end_of(job) if job.status.is_terminal() else None

    def _answered(self) -> None:
        self.heard = time.monotonic()
        if self.lost:
            self.lost = False
            self.say("the dashboard answers again")

    def _bear(self, error: Exception) -> None:
        """Go on without the dashboard for a while."""
        away = time.monotonic() - self.heard
        if away > _PATIENCE_S:
            raise JobError(
                f"the dashboard has not answered for {duration(away)} ({in_words(error, last_line=True)}); the job may "
                f"go on: `lumos jobs logs {self.job_id} --follow`"
            ) from error
        if not self.lost:
            self.lost = True
            self.say(f"the connection to the dashboard dropped ({in_words(error, last_line=True)}); trying again")

    async def _pieces(self) -> AsyncGenerator[str, None]:
        """What of the log was not shown yet, as it comes; ends when the dashboard ends it."""
        skip = self.seen
        lines = cast(AsyncGenerator[str, None], self.client.tail_job_logs(self.job_id))
        async with aclosing(lines) as tail:
            following = asyncio.ensure_future(anext(tail))
            try:
                while True:
                    done, _ = await asyncio.wait({following}, timeout=_QUIET_S)
                    if not done:  # nothing to say, or the network is cut: nobody would tell
                        if await self._ended() is not None:
                            done, _ = await asyncio.wait({following}, timeout=_QUIET_S)
                            if not done:
                                return
                        continue
                    try:
                        piece = following.result()
                    except StopAsyncIteration:
                        return
                    self._answered()
                    following = asyncio.ensure_future(anext(tail))
                    fresh = piece[skip:]
                    skip = max(0, skip - len(piece))
                    self.seen += len(fresh)
                    if fresh:
                        yield fresh
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)


def stop(client: JobClient, job_id: str, say: Say) -> JobEnd:
    """Ask a job to stop (SIGTERM, upon which a training saves a checkpoint), and wait until it has.

    Raises:
        JobError: if the cluster does not know the job, does not answer, or the job does not end.
    """
    try:
        job = client.job(job_id)
        if job.status.is_terminal():
            return end_of(job)
        client.stop_job(job_id)
        say(f"job {job_id} is told to stop; it has {STOP_SECONDS} s to save what it must")
        heard = time.monotonic()
        deadline = heard + STOP_SECONDS + 60
        while time.monotonic() < deadline:
            try:
                job, heard = client.job(job_id), time.monotonic()
            except (OSError, RuntimeError):
                if time.monotonic() - heard > _STOP_PATIENCE_S:
                    raise
            if job.status.is_terminal():
                return end_of(job)
            time.sleep(0.5)
    except (OSError, RuntimeError, AuthenticationError) as error:
        raise JobError(
            f"job {job_id}: {in_words(error, last_line=True)}; `lumos jobs list` says what it does"
        ) from error
    raise JobError(f"job {job_id} has not ended, {STOP_SECONDS + 60} s after it was told to; the dashboard may say why")
