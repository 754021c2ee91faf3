"""The jobs of a cluster, for a person and as JSON."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError

from pipelines.errors import JobError, UserError, in_words
from pipelines.submission.client import JobClient, shown_address
from pipelines.submission.follow import duration, seconds_of


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """A job in a list."""

    id: str
    name: str
    verb: str  # empty for a job of another program
    status: str  # pending, running, succeeded, failed or stopped
    begun: float | None  # seconds since the epoch
    seconds: float  # until its end or now
    git_commit: str

    @classmethod
    def of_job(cls, job: JobDetails) -> "JobRow":
        """The row of a job."""
        about = job.metadata or {}
        return cls(
            id=str(job.submission_id),
            name=about.get("job_name", ""),
            verb=about.get("lumos_verb", ""),
            status=job.status.value.lower(),
            begun=job.start_time / 1000 if job.start_time else None,
            seconds=round(seconds_of(job), 1),
            git_commit=about.get("lumos_git_commit", ""),
        )


def list_jobs(client: JobClient) -> list[JobRow]:
    """The submitted jobs of a cluster, the latest first; a ``UserError`` if it does not answer."""
    try:
        jobs = [JobRow.of_job(job) for job in client.list_jobs() if job.submission_id]
    except (OSError, RuntimeError, AuthenticationError) as error:
        raise UserError(f"{shown_address(client)}: {in_words(error, last_line=True)}") from error
    return sorted(jobs, key=lambda row: row.begun or 0.0, reverse=True)


def find_job(client: JobClient, named: str) -> str:
    """The id of the job that an id, or the latest of a name, stands for; a ``UserError`` if there is none."""
    rows = list_jobs(client)
    for row in rows:
        if row.id == named:
            return row.id
    for row in rows:
        if row.name == named:
            return row.id
    known = ", ".join(row.id for row in rows[:5]) or "none"
    raise UserError(f"{named}: {shown_address(client)} has no job of that id or name; the latest are: {known}")


def read_log(client: JobClient, job_id: str) -> str:
    """What a job has printed until now.

    Raises:
        JobError: if it cannot be read, as when its node is gone.
    """
    try:
        return str(client.get_job_logs(job_id))
    except (OSError, RuntimeError, AuthenticationError) as error:
        raise JobError(f"the log of job {job_id} cannot be read: {in_words(error, last_line=True)}") from error


def as_table(rows: Sequence[JobRow]) -> str:
    """Columns for a terminal."""
    cells = [("ID", "NAME", "VERB", "STATUS", "BEGUN", "LENGTH")]
    for row in rows:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.begun)) if row.begun else "-"
        cells.append((row.id, row.name or "-", row.verb or "-", row.status, begun, duration(row.seconds)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def as_values(rows: Sequence[JobRow]) -> list[dict[str, object]]:
    """The same for programs."""
    return [asdict(row) for row in rows]
