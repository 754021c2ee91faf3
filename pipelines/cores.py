"""The cores of this machine that a process may use."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores this process may use, which in a container or under taskset are fewer than the machine's."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas()])))


def _quotas() -> Iterator[float]:
    """Cores' worth of time that the process's control group has, and each of those above it; of both versions."""
    with suppress(OSError):
        for line in _OWN.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = _GROUPS / "cpu" if controllers else _GROUPS
            inner = root / path.lstrip("/")  # in a container it may be the host's path, which is not there
            for folder in [inner, *inner.parents][: len(inner.parts) - len(root.parts) + 1]:
                with suppress(OSError, ValueError):  # no limit: no such file, "max", or -1
                    quota, period = _limit(folder, version=1 if controllers else 2)
                    if quota > 0:
                        yield quota / period


def _limit(folder: Path, *, version: int) -> tuple[float, float]:
    if version == 2:
        quota, period = (folder / "cpu.max").read_text().split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return float(quota), float(period)
