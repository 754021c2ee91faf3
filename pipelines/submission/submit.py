"""A checked request becomes a job of a cluster."""

import contextlib
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ray.exceptions import AuthenticationError

from pipelines.config import EXPECTED, provenance
from pipelines.errors import JobError, UserError, in_words
from pipelines.submission.bundle import bundle, choose_project
from pipelines.submission.client import JobClient, check_versions, is_this_machine, shown_address
from pipelines.submission.follow import STOP_SECONDS
from pipelines.submission.request import Request, with_places

_ATTEMPTS = 4  # to hand a job over to a dashboard that is busy; after 1, 2, 4 and 8 s it is looked for
_BAR_SECONDS = "5"  # between two states of a progress bar, each a line of a job's log


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a request is to be run."""

    name: str | None = None  # begins the job's id; None: the verb
    variables: Mapping[str, str]  # of the job, carried from here
    project: str = "auto"  # upload, installed or auto
    shared_paths: bool = False  # whether this machine's paths are those of all nodes

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", self.name):
            raise UserError(f"--name {self.name}: use up to 63 letters, digits, dots, dashes and underscores")


def submit(client: JobClient, request: Request, options: Options) -> str:
    """Start a job; all that can be found wrong is found before the first byte is uploaded.

    Returns:
        The job's id.

    Raises:
        UserError: if the cluster runs other versions, does not have the request's paths, or the project is too large.
        JobError: if the cluster does not take the job.
    """
    try:
        check_versions(client)
        here = is_this_machine(client)
    except (OSError, RuntimeError, AuthenticationError) as error:
        raise UserError(f"{shown_address(client)}: {in_words(error, last_line=True)}") from error
    where = f"the cluster at {shown_address(client)}"
    request = with_places(request, here=here, shared=options.shared_paths, where=where)
    project = choose_project(options.project)
    commit = str(provenance()["git_commit"])
    name = options.name or request.verb
    variables = {
        **options.variables,
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        "TQDM_MININTERVAL": _BAR_SECONDS,
        **({"LUMOS_GIT_COMMIT": commit} if project == "upload" else {EXPECTED: f"{_release()} {commit}"}),
    }
    job = {
        "entrypoint": request.entrypoint,
        "submission_id": f"{name}-{secrets.token_hex(4)}",
        "metadata": {"job_name": name, "lumos_verb": request.verb, "lumos_git_commit": commit},
    }
    with bundle(project, request.files) as folder:
        return _submit(client, {**job, "runtime_env": {"working_dir": str(folder), "env_vars": variables}})


def _submit(client: JobClient, job: Mapping[str, Any]) -> str:
    """Hand a job over; once, whatever becomes of the answers, as its id is known beforehand."""
    job_id = str(job["submission_id"])
    for attempt in range(_ATTEMPTS):
        try:
            return client.submit_job(**job)
        except (OSError, RuntimeError, AuthenticationError) as error:
            if attempt and "already exists" in str(error):  # an attempt before was taken, and its answer lost
                return job_id
            may_pass = isinstance(error, OSError) or "No available agent" in str(error)
            failure: Exception = error
        if may_pass:
            time.sleep(2**attempt)
            with contextlib.suppress(OSError, RuntimeError, AuthenticationError, JobError):
                return str(client.job(job_id).submission_id)
        if not may_pass or attempt == _ATTEMPTS - 1:
            text = in_words(failure, last_line=True)
            raise JobError(
                f"the cluster did not take the job, or did not say so: {text}; `lumos jobs list` has {job_id} if it did"
            ) from failure
    raise AssertionError


def _release() -> str:
    try:
        return metadata.version("lumos-ray")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "--project installed: lumos-ray is not installed here, so that its version cannot be compared; use "
            "--project upload"
        ) from error
