"""Peak memory of this process and everything it started, by sampling."""

import contextlib
import threading
from types import TracebackType

import psutil

_GB = 1e9


class PeakMemory:
    """Samples the memory of the process tree in a thread while the block runs.

    Shared pages (Ray's object store, libraries) are counted once: each process counts its proportional share (PSS on
    Linux, its own pages elsewhere). Processes of a cluster that was joined rather than started here are not children
    of this process and are not counted.

    Attributes:
        peak_gb: Highest total seen so far, in GB of 10^9 bytes.
    """

    def __init__(self, interval_s: float = 3.0) -> None:
        self.peak_gb = 0.0
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        """Begin to sample."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take a last sample and stop."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        root = psutil.Process()
        while True:
            self.peak_gb = max(self.peak_gb, tree_memory(root) / _GB)
            if self._done.wait(self._interval_s):
                return


def tree_memory(root: psutil.Process) -> int:
    """Bytes of a process and its descendants now; processes that end meanwhile count as far as they were seen."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            info = process.memory_full_info()
            total += getattr(info, "pss", 0) or info.uss
    return total
