"""One run at a time in a folder: who holds it is written there.

A local lock ends with its process, however that dies. A lock in S3 is an object that the run makes where there is none
and writes anew while it lives; left by a killed run it counts for ``EXPIRY_SECONDS`` more, or until ``unlock``. Who
comes meanwhile looks whether it is renewed, and waits: a job that a cluster starts again need not be told to.
"""

import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines import storage
from pipelines.errors import JobError, UserError
from pipelines.storage import s3

LOCK_FILE = ".lock"
RENEW_SECONDS = 5.0  # between the signs of life of a run that holds a dataset in S3
EXPIRY_SECONDS = 60.0  # without one, the dataset may be taken
_ROUNDS = 5  # of a contest between runs that start at once
_LOOK_SECONDS = 1.0  # between two looks at a lock that may be a killed run's
_LOOKS = 5  # that may fail in a row, and then one more


@dataclass
class Owner:
    """The run that holds a lock."""

    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat("T", "seconds"))
    command: str = field(default_factory=lambda: shlex.join(sys.argv)[:200])
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    renewals: int = 0  # makes each version of the object another

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}: {self.command}"

    def to_bytes(self) -> bytes:
        """As it stands in the lock."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Owner":
        """What a lock says; of one that another program wrote, nothing is known."""
        try:
            return cls(**json.loads(data))
        except (TypeError, ValueError):
            return cls(pid=0, host="unknown", since="unknown", command="unknown", token="")


@contextmanager
def local_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold a local folder, made where there is none, for the time of the block; messages call it by the name.

    A ``UserError`` if another process holds it (the message names that process), or it cannot be written to.
    """
    path = folder / LOCK_FILE
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        content = path.read_bytes()
        owner = Owner.from_bytes(content) if content else "just starting"
        raise UserError(f"{name} is in use by another run ({owner}): wait for it, stop it, or name another") from error
    except OSError as error:
        raise UserError(f"{name} cannot be written to ({error.strerror}); name another folder") from error
    try:
        path.write_bytes(Owner().to_bytes())
        yield
    finally:
        lock.release()


@contextmanager
def dataset_lock(dataset: str, *, name: str = "") -> Iterator[None]:
    """Hold a dataset for the time of the block; ``check_lock`` tells a run within it that it lost the dataset.

    It may be any other folder that one run at a time works in; messages call it by the name.

    Stores other than S3 are not locked.

    Raises:
        UserError: if another run holds it (the message names that run), or it cannot be written to.
        JobError: if another run took it over; at the latest at the end of the block.
    """
    if storage.is_local(dataset):
        with local_lock(Path(storage.filesystem(dataset)[1]), name or f"dataset {dataset}"):
            yield
    elif s3.is_s3(dataset):
        s3.check_store(dataset)
        lock = _S3Lock(dataset, name or f"dataset {dataset}")
        lock.acquire()
        _held[dataset] = lock
        try:
            yield
            lock.check()
        finally:
            del _held[dataset]
            lock.release()
    else:
        yield


def check_lock(dataset: str) -> None:
    """Before a commit: raise a ``JobError`` if this process took the lock of a dataset and lost it to another."""
    if dataset in _held:
        _held[dataset].check()


def is_lost(dataset: str) -> bool:
    """Whether this process took the lock of a dataset and knows that it lost it; nobody is asked."""
    lock = _held.get(dataset)
    return lock is not None and lock.lost


def unlock(dataset: str, *, force: bool = False) -> str:
    """Take away the lock that a killed run left on a dataset; returns what was done, for a person.

    With ``force``, also one that may still be renewed: a run that lives stops at its next commit, then.

    Raises:
        UserError: if a run holds it, or may.
    """
    uri = storage.join(dataset, LOCK_FILE)
    s3.check_store(dataset)
    if not s3.is_s3(dataset) and storage.exists(uri):
        with dataset_lock(dataset):  # refuses if a run holds it; a lock file without one holds nobody
            pass
    found = _read(uri) if s3.is_s3(dataset) else None
    if found is None:
        return f"{dataset} is not locked"
    owner, tag, age = found
    if age < EXPIRY_SECONDS and not force:
        raise UserError(
            f"dataset {dataset} is in use by a run ({owner}), which gave a sign of life {age:.0f} s ago: stop that "
            f"run; if it was killed, the dataset is free {EXPIRY_SECONDS - age:.0f} s from now, or with --force at once"
        )
    try:
        s3.write_object_if(uri, Owner().to_bytes(), tag=tag)  # from now on a run that lives has lost it
        _delete(uri)
    except (FileExistsError, FileNotFoundError) as error:
        raise UserError(f"dataset {dataset} was locked or freed just now ({owner}): look again") from error
    return f"{dataset} is free; it was locked by {owner}, whose last sign of life is {age:.0f} s old"


class _S3Lock:
    """An object that says who holds a dataset, and its upkeep."""

    def __init__(self, dataset: str, name: str) -> None:
        self.dataset, self.name = dataset, name
        self.uri = storage.join(dataset, LOCK_FILE)
        self.owner = Owner()
        self.tag = ""  # of the version that we wrote last
        self.renewed = 0.0  # when, on the monotonic clock
        self.lost = False
        self._renewing = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_end, name="dataset-lock", daemon=True)

    def acquire(self) -> None:
        """Become the owner, or raise a ``UserError`` if another run lives, or the object cannot be written."""
        tag: str | None = None
        try:
            for _ in range(_ROUNDS):
                if self._write(tag):
                    self._thread.start()
                    return
                tag = self._outlive()
        except OSError as error:
            raise UserError(
                f"{self.name} cannot be locked ({error.strerror}): the credentials must allow to write "
                "there, and the store must know conditional writes (If-None-Match, If-Match)"
            ) from error
        raise UserError(f"{self.name} is in use by other runs, just starting: wait for them, or stop them")

    def _outlive(self) -> str | None:
        """Wait for the lock to expire or to go; the tag of the expired version, or None where there is none.

        Raises:
            UserError: if the run that holds it gives a sign of life.
        """
        first = found = _read(self.uri)
        while found is not None and first is not None and found[2] < EXPIRY_SECONDS:
            owner, tag, age = found
            if tag != first[1]:
                raise UserError(
                    f"{self.name} is in use by another run ({owner}), which gave a sign of life just now: wait for "
                    "it, stop it, or name another"
                )
            if found is first:
                sys.stderr.write(
                    f"{self.name} was in use by another run ({owner}), whose last sign of life is {age:.0f} s old: "
                    f"waiting up to {EXPIRY_SECONDS - age:.0f} s for another. If it was killed, `lumos data unlock "
                    f"{self.dataset} --force` frees it at once\n"
                )
            found = self._look()
        return found[1] if found else None

    def _look(self) -> tuple[Owner, str, float] | None:
        """What the lock says in a moment; a store that fails now and then is asked again."""
        for _ in range(_LOOKS):
            time.sleep(_LOOK_SECONDS)
            with suppress(OSError):
                return _read(self.uri)
        return _read(self.uri)

    def _write(self, tag: str | None) -> bool:
        """Write the object in place of a version of it, or of none; whether it is ours then."""
        begin = time.monotonic()
        self.owner.renewals += 1
        try:
            self.tag = s3.write_object_if(self.uri, self.owner.to_bytes(), tag=tag)
        except (FileExistsError, FileNotFoundError):
            found = _read(self.uri)  # perhaps our own write, whose answer was lost
            if found is None or found[0].token != self.owner.token:
                return False
            self.tag = found[1]
        self.renewed = begin
        return True

    def _renew_until_end(self) -> None:
        while not self.lost and not self._end.wait(RENEW_SECONDS):
            # A store that is down is down for all, and the object still ours when it comes back.
            with suppress(OSError, UserError):
                self._renew()

    def _renew(self) -> None:
        """Give a sign of life, or note that the dataset is another's."""
        with self._renewing:
            self.lost = not self._write(self.tag)

    def check(self) -> None:
        """Raise a ``JobError`` if another run has the dataset; where the thread could not tell, ask the store."""
        if not self.lost and time.monotonic() - self.renewed > EXPIRY_SECONDS:
            self._renew()
        if self.lost:
            raise JobError(
                f"another run took {self.name} over, or it was unlocked, as this one gave no sign of life "
                f"for {EXPIRY_SECONDS:g} s; what was committed is kept: give the same command again when that run has "
                "ended"
            )

    def release(self) -> None:
        """Take the object away; if that fails, it expires soon."""
        self._end.set()
        self._thread.join()
        with suppress(OSError, UserError):
            found = _read(self.uri)
            if found is not None and found[0].token == self.owner.token:
                _delete(self.uri)


_held: dict[str, _S3Lock] = {}  # by this process


def _read(uri: str) -> tuple[Owner, str, float] | None:
    """Who holds a lock, the tag of that version of the object, and the seconds since it was written."""
    try:
        tag, age = s3.describe_object(uri)  # first: if the data are of a later version, a write in its place fails
        data = s3.filesystem(brisk=True).cat_file(s3.path(uri))
    except FileNotFoundError:
        return None
    return Owner.from_bytes(data), tag, age


def _delete(uri: str) -> None:
    s3.filesystem(brisk=True).rm_file(s3.path(uri))
