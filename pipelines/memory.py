"""Memory of processes, sampled while work goes on."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import psutil


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
