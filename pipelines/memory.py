"""Memory of processes: what they hold, sampled while work goes on, and what they give back."""

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator

import psutil

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_LARGE = 4 * 2**20


def give_back_large_buffers() -> None:
    """Let buffers of 4 MiB and more go back to the system as soon as they are free (glibc; nothing elsewhere).

    Left alone, glibc comes to keep them for later, up to 32 MiB each. A pass with checkpointing then holds 2.6 GB where
    2.1 do, and is 2 to 5 % faster (`jobs/benchmark.py train`).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back_free_memory() -> None:
    """Give back to the system what is free in this process (glibc; nothing elsewhere).

    Left alone, glibc keeps what threads have freed, for each of them: the driver of a curation held 300 MB where its
    tables had 70.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.malloc_trim(0)


def own_memory() -> float:
    """Bytes of this process that are in memory."""
    return float(psutil.Process().memory_info().rss)


def tree_memory() -> float:
    """Bytes of this process and its descendants; those that end meanwhile count as far as they were seen.

    Shared pages (Ray's object store, libraries) are counted once: each process counts its proportional share (PSS on
    Linux, its own pages elsewhere). Processes of a cluster that was joined rather than started here are not children
    of this process and are not counted.
    """
    root = psutil.Process()
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            info = process.memory_full_info()
            total += getattr(info, "pss", 0) or info.uss
    return float(total)


@contextlib.contextmanager
def sampled_memory(measure: Callable[[], float], seconds: float) -> Iterator[list[float]]:
    """Samples of a measure while the block runs, so many seconds apart; the first is that at its begin."""
    samples = [measure()]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            samples.append(measure())

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
