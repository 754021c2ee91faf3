"""One run at a time on a dataset."""

import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pipelines import storage
from pipelines.errors import JobError, UserError
from pipelines.storage import s3

RENEW_SECONDS = 15.0  # between the signs of life of a run that holds a dataset in S3
STALE_SECONDS = 60.0  # without one, the dataset may be taken
_FILE = ".lock"
_ROUNDS = 5  # of a contest between runs that start at once


@contextmanager
def dataset_lock(dataset: str) -> Iterator[None]:
    """Hold a dataset for the time of the block.

    On a local disk the system lets go of it when the process dies, however it does. In S3 an object stands for the run
    and is renewed by a thread; that of a run which was killed counts for ``STALE_SECONDS``, or until a run on the same
    machine sees that its process is gone. A run that was halted for longer and lost the dataset is interrupted when it
    goes on (only in the main thread, elsewhere it is told at the end of the block). Other stores are not locked.

    Raises:
        UserError: if another run holds it (the message names that run), or it cannot be written to.
        JobError: if another run took it over.
    """
    if storage.is_local(dataset):
        with _local_lock(dataset):
            yield
    elif s3.is_s3(dataset):
        with _s3_lock(dataset):
            yield
    else:
        yield


@dataclass
class _Holder:
    """The run that holds a dataset."""

    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat("T", "seconds"))
    machine: str = field(default_factory=lambda: _machine())
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    renewals: int = 0  # makes each version of the object another

    def __str__(self) -> str:
        return json.dumps({"pid": self.pid, "host": self.host, "since": self.since})

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def is_gone(self) -> bool:
        """Whether this is a process of this machine that has ended."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def _machine() -> str:
    """Names this start of this machine, and the container in which process ids count; "" where that is not told."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@contextmanager
def _local_lock(dataset: str) -> Iterator[None]:
    folder = Path(storage.filesystem(dataset)[1])
    try:
        file = storage.hold_file(folder / _FILE)
    except OSError as error:
        raise UserError(f"dataset {dataset} cannot be written to ({error.strerror}); name another folder") from error
    except storage.FileHeldError as holder:
        raise UserError(
            f"dataset {dataset} is in use by another run ({str(holder) or 'just starting'}): wait for it, stop it, or "
            "name another dataset"
        ) from holder
    with file:
        file.seek(0)
        file.truncate()
        file.write(str(_Holder()))
        file.flush()
        yield


@contextmanager
def _s3_lock(dataset: str) -> Iterator[None]:
    s3.check_store(dataset)
    holding = _Holding(storage.join(dataset, _FILE))
    try:
        holding.acquire(dataset)
    except OSError as error:
        raise UserError(
            f"dataset {dataset} cannot be locked ({error.strerror}): the credentials must allow to write there, and "
            "the store must know conditional writes (If-None-Match, If-Match)"
        ) from error
    renewing = threading.Thread(target=holding.renew_until_end, name="dataset-lock", daemon=True)
    renewing.start()
    try:
        try:
            yield
        finally:
            holding.end.set()
            renewing.join()
    except KeyboardInterrupt:
        if not holding.lost:
            raise
    finally:
        if not holding.lost:
            holding.release()
    if holding.lost:
        raise JobError(
            f"another run took dataset {dataset} over, as this one gave no sign of life for {STALE_SECONDS:g} s; what "
            "was committed is kept: give the same command again when that run has ended"
        )


class _Holding:
    """An object that says who holds a dataset, and its upkeep."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.holder = _Holder()
        self.tag = ""  # of the version that we wrote last
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        self.end = threading.Event()
        self.lost = False

    def acquire(self, dataset: str) -> None:
        """Become the holder.

        Raises:
            UserError: if another run is.
            OSError: if the object cannot be written.
        """
        tag: str | None = None
        for _ in range(_ROUNDS):
            with suppress(FileExistsError, FileNotFoundError):
                self.tag = s3.write_object_if(self.uri, self.holder.to_bytes(), tag=tag)
                return
            found = self._read()
            if found is None:
                tag = None
                continue
            other, tag, age = found
            if other.token == self.holder.token:  # our own write, whose answer was lost
                self.tag = tag
                return
            if age < STALE_SECONDS and not other.is_gone():
                raise UserError(
                    f"dataset {dataset} is in use by another run ({other}), which gave a sign of life {age:.0f} s ago: "
                    "wait for it, stop it, or name another dataset. If it was killed, the dataset is free "
                    f"{STALE_SECONDS - age:.0f} s from now, or at once when {self.uri} is deleted"
                )
        raise UserError(f"dataset {dataset} is in use by other runs, just starting: wait for them, or stop them")

    def renew_until_end(self) -> None:
        """Give signs of life; where another run has taken the dataset, interrupt this one."""
        while not self.end.wait(RENEW_SECONDS):
            # A store that is down is down for all, and the object still ours when it comes back.
            with suppress(OSError, UserError):
                self._renew()
            if self.lost:
                if self.in_main_thread:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it from any wait
                return

    def _renew(self) -> None:
        self.holder.renewals += 1
        try:
            self.tag = s3.write_object_if(self.uri, self.holder.to_bytes(), tag=self.tag)
        except (FileExistsError, FileNotFoundError):
            found = self._read()
            if found is None or found[0].token != self.holder.token:
                self.lost = True
            else:
                self.tag = found[1]

    def release(self) -> None:
        """Take the object away; if that fails, it is stale soon."""
        with suppress(OSError, UserError):
            found = self._read()
            if found is not None and found[0].token == self.holder.token:
                s3.filesystem(brisk=True).rm_file(s3.path(self.uri))

    def _read(self) -> tuple[_Holder, str, float] | None:
        """Who holds the dataset, the tag of that version of the object, and the seconds since it was written."""
        try:
            data = storage.read_bytes(self.uri)
            tag, age = s3.describe_object(self.uri)  # later than the data: an age of theirs, or of something younger
        except FileNotFoundError:
            return None
        try:
            return _Holder(**json.loads(data)), tag, age
        except (TypeError, ValueError):
            return _Holder(pid=0, host="unknown", since="unknown", machine="", token=""), tag, age
