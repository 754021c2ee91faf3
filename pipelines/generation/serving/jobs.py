"""Jobs that outlive the processes which do them: one JSON file each in a folder, local or in S3, and files beside it.

Whoever does a job is named in its file, and every change replaces the very version that was read. So of two processes
that reach for a job one gets it, and one that was taken for dead can commit nothing afterwards. A process is alive
while it writes its sign of life; the jobs of one that stopped doing so are free.

    JOBS/<id>.json             the job
    JOBS/files/<id>/...        its video, named in it once it is done, pictures on the way, and the frames given
    JOBS/alive/<process>       signs of life, which hold the process's counts for Prometheus
"""

import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import TypeAdapter

from lumos.compression import VideoSize
from lumos.config import SamplingConfig
from pipelines import storage
from pipelines.errors import UserError
from pipelines.generation.request import VideoRequest
from pipelines.storage import s3

Status = Literal["queued", "in_progress", "completed", "failed"]

_YOUNG_S = 600.0
LEASE_S = 20.0  # without a sign of life, the jobs of a process are free
_SUFFIX = ".json"
_ID = re.compile(r"video_[0-9a-f]{31}")
_ALIVE, _FILES, _LOCK = "alive", "files", ".lock"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is kept of a job."""

    id: str  # sorts by time of creation
    owner: str  # whose it is: a digest of the token, empty where there is none
    model: str
    request: dict[str, Any]
    created_at: float  # seconds since the epoch, all times
    expires_at: float
    status: Status = "queued"
    worker: str = ""  # the process that does it
    attempt: int = 0  # how often a process has taken it
    done: int = 0  # latent frames
    total: int = 1
    completed_at: float | None = None
    file: str | None = None  # the video, below the job's files
    error: dict[str, str] | None = None  # code and message
    source: str | None = None  # the job whose video this one goes on with
    num_given: int = 0  # frames that what is drawn begins with
    num_before: int = 0  # frames of that one which are not drawn again
    ids: list[str] = field(default_factory=list)  # all jobs of one request
    config_hash: str = ""

    @property
    def is_open(self) -> bool:
        """Whether something is still to be done."""
        return self.status in ("queued", "in_progress")


@dataclass(frozen=True)
class Version:
    """A job as it was read; changing it asks that nobody has changed it since."""

    job: Job
    tag: str


_JOB, _SIZE, _SAMPLING = TypeAdapter(Job), TypeAdapter(VideoSize), TypeAdapter(SamplingConfig)
REQUEST_FIELDS = {field.name for field in fields(VideoRequest) if not field.name.startswith("given")}


class JobLostError(Exception):
    """The job was deleted, or is another process's by now."""


def request_to_json(request: VideoRequest) -> dict[str, Any]:
    """A request in plain values, the given frames apart, which are a file of the job."""
    values = {name: value for name, value in vars(request).items() if not name.startswith("given")}
    return {**values, "size": asdict(request.size), "sampling": asdict(request.sampling)}


def request_of(job: Job) -> VideoRequest:
    """What a job asks for, without the frames given; what a newer program says besides is left out."""
    values = {name: value for name, value in job.request.items() if name in REQUEST_FIELDS}
    size, sampling = _SIZE.validate_python(values.pop("size")), _SAMPLING.validate_python(values.pop("sampling"))
    return VideoRequest(size=size, sampling=sampling, **values)


def new_id(now: float) -> str:
    """An id for a job; later ones sort after earlier ones."""
    return f"video_{int(now * 1000):011x}{secrets.token_hex(10)}"


class JobStore:
    """The jobs of a folder, for one process; every method may wait for the disk or the store.

    Raises:
        UserError: if the folder cannot be used.
    """

    def __init__(self, uri: str, worker: str = "") -> None:
        self.uri = storage.filesystem(uri)[1] if storage.is_local(uri) else uri.rstrip("/")
        self.worker = worker or f"{os.getpid()}-{secrets.token_hex(6)}"
        self._files = _S3Files() if s3.is_s3(uri) else _LocalFiles(self.uri)
        s3.check_store(uri)
        if not storage.is_local(uri) and not s3.is_s3(uri):
            raise UserError(f"jobs: {uri} is neither a local folder nor s3://, which conditional writes need")

    def create(self, job: Job) -> Version:
        """Keep a new job."""
        try:
            return Version(job, self._files.write(self._uri(job.id), _to_bytes(job), None))
        except FileExistsError:  # in S3: our own write, whose answer was lost; ids are random
            return self.read(job.id) or Version(job, "")

    def read(self, job_id: str) -> Version | None:
        """A job, or none where there is no such id; a file that is no job counts as none."""
        if not _ID.fullmatch(job_id):  # whatever a client wrote is no path
            return None
        found = self._files.read(self._uri(job_id))
        return found and _from_bytes(*found)

    def change(self, version: Version, **changes: Any) -> Version:
        """Write a job anew, with a sign that it is this process's.

        Raises:
            JobLostError: if it is not as it was read.
        """
        job = replace(version.job, **changes)
        try:
            return Version(job, self._files.write(self._uri(job.id), _to_bytes(job), version.tag))
        except (FileExistsError, FileNotFoundError) as error:
            now = self.read(job.id)  # perhaps our own write, whose answer was lost
            if now is not None and now.job == job:
                return now
            raise JobLostError(job.id) from error

    def claim(self, version: Version) -> Version | None:
        """Take an open job whose process is gone, or is this one, which then must not be at it.

        None if it is not free, or another was quicker.
        """
        job = version.job
        if not job.is_open or (job.worker != self.worker and self.is_alive(job.worker)):
            return None
        with suppress(JobLostError):
            return self.change(version, worker=self.worker, attempt=job.attempt + 1, status="queued", done=0)
        return None

    def delete(self, job_id: str) -> None:
        """Forget a job: first the job, so that whoever does it can commit no more, then its files."""
        self._files.delete(self._uri(job_id))
        storage.remove(storage.join(self.uri, _FILES, job_id))

    def ids(self) -> list[str]:
        """All jobs, oldest first."""
        names = (name.removesuffix(_SUFFIX) for name in storage.list_names(self.uri))
        return [name for name in names if _ID.fullmatch(name)]

    def write_file(self, job_id: str, name: str, data: bytes) -> None:
        """Keep a file of a job."""
        storage.write_bytes_atomic(self._file(job_id, name), data)

    def read_file(self, job_id: str, name: str) -> bytes | None:
        """A file of a job; None where there is none."""
        try:
            return storage.read_bytes(self._file(job_id, name))
        except FileNotFoundError:
            return None

    def local_path(self, job_id: str, name: str) -> str | None:
        """Where a file of a job is on a disk; None in S3."""
        return self._file(job_id, name) if storage.is_local(self.uri) else None

    def file_size(self, job_id: str, name: str) -> int:
        """Bytes of a file of a job."""
        files, path = storage.filesystem(self._file(job_id, name))
        return int(files.size(path))

    def read_range(self, job_id: str, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start..stop-1`` of a file of a job."""
        return storage.read_range(self._file(job_id, name), start, stop)

    def remove_file(self, job_id: str, name: str) -> None:
        """Drop a file of a job."""
        storage.remove(self._file(job_id, name))

    def give_sign(self, counts: bytes = b"") -> None:
        """Tell that this process is alive, and what it has counted."""
        storage.write_bytes_atomic(storage.join(self.uri, _ALIVE, self.worker), counts)

    def all_counts(self) -> list[bytes]:
        """What each process that is alive has counted."""
        found = []
        for worker in storage.list_names(storage.join(self.uri, _ALIVE)):
            if not worker.startswith(".") and self.is_alive(worker):
                with suppress(FileNotFoundError):  # it ended just now
                    found.append(storage.read_bytes(storage.join(self.uri, _ALIVE, worker)))
        return found

    def take_sign_away(self) -> None:
        """Tell that this process ends: its jobs are free at once."""
        storage.remove(storage.join(self.uri, _ALIVE, self.worker))

    def is_alive(self, worker: str) -> bool:
        """Whether a process gave a sign of life lately."""
        age = self._files.age(storage.join(self.uri, _ALIVE, worker)) if worker else None
        return age is not None and age < LEASE_S

    def sweep(self, known: Sequence[str]) -> None:
        """Remove files of jobs that are gone and signs of processes that are, except of jobs known to live."""
        kept = set(known) | set(self.ids())
        young = new_id(time.time() - _YOUNG_S)  # a job that another process is just taking in has files first
        for name in storage.list_names(storage.join(self.uri, _FILES)):
            if name not in kept and name < young:
                storage.remove(storage.join(self.uri, _FILES, name))
        for worker in storage.list_names(storage.join(self.uri, _ALIVE)):
            if not worker.startswith(".") and not self.is_alive(worker):
                storage.remove(storage.join(self.uri, _ALIVE, worker))

    def _uri(self, job_id: str) -> str:
        return storage.join(self.uri, job_id + _SUFFIX)

    def _file(self, job_id: str, name: str) -> str:
        return storage.join(self.uri, _FILES, job_id, name)


class _LocalFiles:
    """Conditional writes in a local folder: one process at a time compares and replaces."""

    def __init__(self, folder: str) -> None:
        self._lock = Path(storage.filesystem(folder)[1]) / _LOCK
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise UserError(f"jobs: {folder} cannot be written to ({error.strerror}); name another folder") from error

    def _locked(self) -> FileLock:
        return FileLock(self._lock, poll_interval=0.005)

    def read(self, uri: str) -> tuple[bytes, str] | None:
        try:
            data = Path(uri).read_bytes()
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def write(self, uri: str, data: bytes, tag: str | None) -> str:
        with self._locked():
            found = self.read(uri)
            if (found and found[1]) != tag:
                raise FileExistsError(errno.EEXIST, "was changed meanwhile", uri)
            storage.write_bytes_atomic(uri, data)
        return hashlib.sha256(data).hexdigest()

    def delete(self, uri: str) -> None:
        with self._locked():
            Path(uri).unlink(missing_ok=True)

    def age(self, uri: str) -> float | None:
        try:
            return time.time() - Path(uri).stat().st_mtime
        except FileNotFoundError:
            return None


class _S3Files:
    """Conditional writes of the store itself."""

    def read(self, uri: str) -> tuple[bytes, str] | None:
        try:
            tag, _ = s3.describe_object(uri)  # earlier than the data: if that is newer, a change will fail
            return s3.filesystem(brisk=True).cat_file(s3.path(uri)), tag
        except FileNotFoundError:
            return None

    def write(self, uri: str, data: bytes, tag: str | None) -> str:
        return s3.write_object_if(uri, data, tag=tag)

    def delete(self, uri: str) -> None:
        with suppress(FileNotFoundError):
            s3.filesystem(brisk=True).rm_file(s3.path(uri))

    def age(self, uri: str) -> float | None:
        try:
            return s3.describe_object(uri)[1]
        except FileNotFoundError:
            return None


def _to_bytes(job: Job) -> bytes:
    return json.dumps(asdict(job), indent=1, sort_keys=True, ensure_ascii=False).encode()


def _from_bytes(data: bytes, tag: str) -> Version | None:
    try:
        job = _JOB.validate_json(data)  # what newer programs say besides is ignored
        request_of(job)
    except (KeyError, TypeError, ValueError):
        return None
    return Version(job, tag)
