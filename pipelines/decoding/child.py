"""What the processes that decode have in common: how they are started, and their bounds."""

import os
import resource
import sys
import threading
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def child_command(module: str, *arguments: str) -> list[str]:
    """The command line of a child."""
    return [sys.executable, "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """This process's environment, with what it can import and one thread."""
    path = os.pathsep.join(dict.fromkeys([str(_ROOT), *filter(None, sys.path)]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def limit_memory(megabytes: int) -> None:
    """Cap what may be allocated beyond the most that was mapped so far: by libraries, and by the network at work."""
    with open("/proc/self/status", encoding="utf-8") as file:
        sizes = [int(line.split()[1]) for line in file if line.startswith(("VmPeak:", "VmSize:"))]  # KiB
    limit = max(sizes) * 1024 + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def die_with_parent() -> None:
    """End when the process that started this one is gone, even in the middle of a job."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
