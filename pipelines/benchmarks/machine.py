"""What a benchmark ran on, and how fast that was meanwhile."""

import os
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipelines.config import provenance
from pipelines.cores import usable_cores

_SIDE = 2048
_REPEATS = 5


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, system, and versions of what matters."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": usable_cores(),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **provenance(),
    }


def product_ms() -> float:
    """Median time of a 2048x2048 float32 product on 2 threads, ms: tells a busy machine from an idle one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    matrix = torch.ones(_SIDE, _SIDE)
    samples = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        _ = matrix @ matrix
        samples.append(1e3 * (time.perf_counter() - begin))
    torch.set_num_threads(threads)
    return statistics.median(samples[1:])


def ratio(floor: Sequence[float], ours: Sequence[float]) -> float:
    """How much of the floor's speed ours reaches: medians of times taken in turns."""
    return round(statistics.median(floor) / statistics.median(ours), 4)
