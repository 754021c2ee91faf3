"""Decoding in a child process that may hang, crash or outgrow its memory without harm to the worker.

A child that dies in the middle of a job is replaced and the job is tried again, three times in all; each death is
recorded durably before the next try, so that a file which kills its decoder cannot stop a run by restarting it.
"""

import hashlib
import signal
import socket
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from pipelines import storage
from pipelines.data.settings import DecodeConfig
from pipelines.decoding.child import child_command, child_environment
from pipelines.decoding.errors import VideoError

MAX_CRASHES = 3
CRASHES = "crashes"  # folder beside a stage's parts
_CHILD_MODULE = "pipelines.data.video.decode_child"
_START_SECONDS = 120.0  # a child imports its libraries from a disk that may be slow


@dataclass(frozen=True)
class DecodeJob:
    """Work for a child."""

    key: str  # names the work in the record of crashes
    name: str  # a key of ``decode_child.JOBS``
    arguments: dict[str, Any]  # of that function
    # Arguments that replace others once the work itself (not somebody's SIGKILL) has ended a child.
    after_crash: dict[str, Any] = field(default_factory=dict)


class CrashLog:
    """How often each piece of work has killed its child, kept in a folder beside the stage's table."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._known: set[str] = set(storage.list_names(uri))

    def causes(self, key: str) -> list[str]:
        """What ended the child, once per crash: "stalled" or the name of a signal."""
        name = self._name(key)
        return list(storage.read_json(storage.join(self.uri, name))["causes"]) if name in self._known else []

    def add(self, key: str, cause: str) -> None:
        """Record one more crash."""
        name, causes = self._name(key), [*self.causes(key), cause]
        storage.write_json_atomic(storage.join(self.uri, name), {"key": key, "causes": causes})
        self._known.add(name)

    def forget(self, key: str) -> None:
        """Start anew with a piece of work."""
        if (name := self._name(key)) in self._known:
            storage.remove(storage.join(self.uri, name))
            self._known.remove(name)

    @staticmethod
    def _name(key: str) -> str:
        return hashlib.sha256(key.encode()).hexdigest()[:32] + ".json"


class DecodeChild:
    """One child process at a time, started when first needed. Not for use by several threads at once."""

    def __init__(self, config: DecodeConfig, crashes: CrashLog, *, weights: str | None = None) -> None:
        self.config = config  # bounds of the child
        self.crashes = crashes  # where its deaths are recorded
        self._weights = weights  # file of the shot detector's network, which a child loads as it starts
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._sent = 0  # jobs that the present child has in its pipe
        self._left = 0  # jobs until it is replaced

    def run(self, jobs: Iterable[DecodeJob | VideoError | None]) -> Iterator[Any]:
        """The result of each job in order, or the ``VideoError`` that it ended with.

        Errors among the jobs pass through. While the caller deals with a result, the child works on the next job. A
        None among them says that there is no next job before another result; where none is due, it is the end.
        """
        if self._sent:  # the last run was left half way, by an error: what the child has yet to answer is not ours
            self.close()
        source = iter(jobs)
        queue: deque[DecodeJob | VideoError] = deque()
        while True:
            while len(queue) < 2 and (job := next(source, None)) is not None:
                queue.append(job)
            if not queue:
                return
            result = self._refusal(queue[0])
            while result is None:
                result = self._try(queue)
            queue.popleft()
            yield result

    def close(self) -> None:
        """End the child; the next job starts another."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None
        self._sent = 0

    def _refusal(self, job: DecodeJob | VideoError) -> VideoError | None:
        """Why a job is not done (any more), if so: it is an error, or has ended too many children."""
        if isinstance(job, VideoError):
            return job
        causes = self.crashes.causes(job.key)
        if len(causes) < MAX_CRASHES:
            return None
        if set(causes) <= {"stalled"}:
            return VideoError("decoder_hangs", f"no progress, {len(causes)} times", transient=True)
        return VideoError("decoder_crashes", f"ended its process {len(causes)} times", transient="SIGKILL" in causes)

    def _try(self, queue: deque[DecodeJob | VideoError]) -> Any:
        """The result of the first job; None if it ended the child and may be tried again."""
        first = queue[0]
        assert isinstance(first, DecodeJob)
        try:
            self._send(queue)
            result = self._receive()
        except _CrashError as crash:
            self.close()
            self.crashes.add(first.key, crash.cause)
            return self._refusal(first)
        self._sent -= 1
        if isinstance(result, VideoError) and result.code == "memory":
            self.close()  # what is left of its memory would fail the next job too
        return result

    def _send(self, queue: deque[DecodeJob | VideoError]) -> None:
        """Have the first jobs in the child's pipe; start a child where there is none or the old one is used up."""
        if self._sent == 0 and (self._process is None or self._left <= 0):
            self.close()
            self._start()
        assert self._connection is not None
        for job in list(queue)[self._sent :]:
            if isinstance(job, VideoError) or (self._sent and (self._left <= 0 or self._refusal(job))):
                return
            odd = any(cause != "SIGKILL" for cause in self.crashes.causes(job.key))
            try:
                self._connection.send((job.name, job.arguments | (job.after_crash if odd else {})))
            except (BrokenPipeError, ConnectionResetError):
                raise self._crash() from None
            self._sent += 1
            self._left -= 1

    def _receive(self) -> Any:
        """The answer to the job that the child has had longest."""
        assert self._connection is not None
        while True:
            try:
                if not self._connection.poll(self.config.stall_seconds):
                    raise _CrashError("stalled")
                answer = self._connection.recv()
            except (EOFError, ConnectionResetError):
                raise self._crash() from None
            if answer[0] == "done":
                return answer[1]
            if answer[0] == "error":
                _, code, detail, transient = answer
                return VideoError(code, detail, transient=transient)

    def _start(self) -> None:
        for _ in range(MAX_CRASHES):
            if self._spawn():
                return
        self._stderr.seek(0)
        words = self._stderr.read()[-2000:].decode(errors="replace").strip()
        raise RuntimeError(f"decode children do not start: {words or 'killed'}")

    def _spawn(self) -> bool:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(self.config.memory_mb), *filter(None, [self._weights])]
        self._stderr.truncate(0)
        with theirs:
            self._process = subprocess.Popen(
                child_command(_CHILD_MODULE, *arguments),
                pass_fds=[theirs.fileno()],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
            )
        self._connection = Connection(ours.detach())
        self._sent, self._left = 0, self.config.recycle_after
        try:
            ready = self._connection.poll(_START_SECONDS) and self._connection.recv() == ("ready",)
        except (EOFError, ConnectionResetError):
            ready = False
        if not ready:
            self.close()
        return ready

    def _crash(self) -> "_CrashError":
        assert self._process is not None
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return _CrashError("stalled")
        return _CrashError(signal.Signals(-status).name if status < 0 else f"exit {status}")


class _CrashError(Exception):
    """The child is gone or has to go."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause
