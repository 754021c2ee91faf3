"""The process that decodes: it takes jobs from a pipe, one at a time, and may be killed at any moment.

Started by ``decode.DecodeChild`` as ``python -m pipelines.data.video.decode_child FD MEMORY_MB [WEIGHTS]``.
"""

import importlib
import logging
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import av
import av.logging
import cv2

from pipelines.data.video.reader import read_clip
from pipelines.data.video.shots import split_source
from pipelines.decoding.child import die_with_parent, limit_memory
from pipelines.decoding.errors import VideoError

JOBS: dict[str, Callable[..., Any]] = {"split": split_source, "clip": read_clip}
BEAT_SECONDS = 0.5


def serve(connection: Connection) -> None:
    """Do jobs (name, arguments) until the pipe closes.

    Answers are ("done", result) or ("error", code, detail, transient); while a job runs, ("beat",) tells that it goes
    on.
    """
    last = 0.0

    def beat() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > BEAT_SECONDS:
            last = now
            connection.send(("beat",))

    connection.send(("ready",))
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, ...] = ("done", _job(name)(**arguments, beat=beat))
        except VideoError as error:
            answer = ("error", error.code, error.detail, error.transient)
        except Exception as error:
            # A file that is odd in a way nobody thought of must not stop the run; many of them exceed its budget.
            logging.exception("%s %s", name, arguments)
            answer = ("error", *_classify(error), False)
        connection.send(answer)


def _job(name: str) -> Callable[..., Any]:
    """A function of ``JOBS``, or any other as MODULE:FUNCTION."""
    if name in JOBS:
        return JOBS[name]
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _classify(error: Exception) -> tuple[str, str]:
    """Code and detail of an error that is not of our making."""
    out_of_memory = isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem
    out_of_memory |= isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # as torch says it
    if out_of_memory or isinstance(error, MemoryError | av.error.MemoryError):
        return "memory", "takes more memory to decode than decode.memory_mb allows"
    if isinstance(error, av.error.FFmpegError):
        return "decode_error", type(error).__name__
    return "unexpected_error", f"{type(error).__name__}: {str(error)[:200]}"


def main() -> None:
    """Load what jobs will need, set bounds and serve."""
    connection, megabytes = Connection(int(sys.argv[1])), int(sys.argv[2])
    av.logging.set_level(av.logging.PANIC)
    cv2.setNumThreads(1)  # the workers share the cores among them
    die_with_parent()
    if weights := sys.argv[3:]:
        from pipelines.data.models.transnet import warm_up  # brings torch, which most children do without

        warm_up(*weights)  # now, since the limit is not meant for the gigabytes that torch maps
    limit_memory(megabytes)
    try:
        serve(connection)
    except (BrokenPipeError, ConnectionResetError):
        return  # the worker is gone


if __name__ == "__main__":
    main()
