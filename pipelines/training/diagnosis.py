"""Why a training is slow, stands still, or runs out of memory: what each worker measures, and what the driver keeps.

The parts of a step are timed on the device's own clock and read once a step has ended, so that nothing waits for them.
"""

import contextlib
import faulthandler
import json
import logging
import resource
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipelines import storage
from pipelines.errors import UserError
from pipelines.training.config import TrainConfig
from pipelines.training.engine import check_engine, read_deepspeed_file
from pipelines.training.record import event

logger = logging.getLogger(__name__)

PHASES_FILE = "phases.jsonl"  # in the output
HANGS_DIR = "hangs"  # in the output
_MAX_ALLOCATIONS = 100_000  # kept of the record of a GPU's memory


class PhaseClock:
    """Seconds of the parts of a step: ``with clock("forward"): ...``."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block."""
        if not self._cuda:
            began = time.perf_counter()
            yield
            self.add(part, time.perf_counter() - began)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((part, first, last))

    def add(self, part: str, seconds: float) -> None:
        """Seconds that were measured elsewhere."""
        self._seconds[part] += seconds

    def take(self) -> dict[str, float]:
        """The seconds since the last call. The device must have been waited for, as by reading the step's loss."""
        for part, first, last in self._events:
            last.synchronize()
            self._seconds[part] += first.elapsed_time(last) / 1000
        taken, self._seconds, self._events = dict(self._seconds), defaultdict(float), []
        return taken


class Diagnosis:
    """One worker's: times of phases, profile, memory, and its stacks when a step hangs."""

    def __init__(
        self, config: TrainConfig, *, rank: int, device: torch.device, uri: str, put: Callable[[str], None]
    ) -> None:
        """Begin to watch.

        Args:
            config: of the run.
            rank: of this worker.
            device: that it computes on.
            uri: folder for profiles, which every node reaches.
            put: hands the driver a line.
        """
        self.config, self.rank, self.device, self.uri, self.put = config, rank, device, uri, put
        self.clock = PhaseClock(device)
        self._hang = _HangWatch(config.diagnosis.hang_seconds, rank=rank, put=put)
        self._profiler: Any = None
        self._profiled_from = 0
        self._sums: dict[str, float] = defaultdict(float)
        self._steps = 0
        if config.profile.memory and device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch a step, 1-based, and what follows it until the next one.

        Raises:
            MemoryError: for a device or machine that is out of memory; it says which keys would help.
        """
        self._hang.begin(number)
        first, last = self.config.profile.steps or (0, 0)
        if first <= number <= last and self._profiler is None:  # later than the first, where a run goes on from there
            self._profiled_from = number
            self._profiler = torch.profiler.profile()  # of the CPU, and of a GPU where there is one
            self._profiler.start()
        try:
            yield
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self._save_memory(f"step-{number:08d}")
            raise MemoryError(
                f"rank {self.rank}, step {number}: out of memory ({str(error).splitlines()[0]}). "
                f"{memory_hint(self.config)}"
            ) from error
        if self._profiler is not None and number >= last:
            self._save_profile(f"steps-{self._profiled_from:08d}-{number:08d}")

    def figures(self, step: int) -> dict[str, Any]:
        """What the record of a step says of this worker, once the step is done."""
        seconds = self.clock.take()
        for part, value in seconds.items():
            self._sums[part] += value
        self._steps += 1
        every = self.config.diagnosis.phases_every
        if every and self._steps >= every:
            means = {part: round(total / self._steps, 6) for part, total in self._sums.items()}
            self.put(event("phases", step=step, rank=self.rank, steps=self._steps, time=time.time(), seconds=means))
            self._sums.clear()
            self._steps = 0
        checkpoint = seconds.pop("checkpoint", 0.0)
        figures: dict[str, Any] = {"phases": seconds, "checkpoint_seconds": checkpoint, "rss_gb": peak_rss() / 1e9}
        if self.device.type == "cuda":
            figures["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return figures

    def close(self) -> None:
        """No more steps to come."""
        self._hang.close()
        if self._profiler is not None:
            self._save_profile("steps-cut-short")

    def _save_profile(self, name: str) -> None:
        self._profiler.stop()
        self._keep(f"{name}-rank-{self.rank:05d}.json.gz", self._profiler.export_chrome_trace)
        self._profiler = None
        self._save_memory(name)

    def _save_memory(self, name: str) -> None:
        if self.config.profile.memory and self.device.type == "cuda":
            self._keep(f"memory-{name}-rank-{self.rank:05d}.pickle", torch.cuda.memory._dump_snapshot)

    def _keep(self, name: str, write: Callable[[str], Any]) -> None:
        """Have a file written, and bring it to where every node reaches."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / name
                write(str(file))
                storage.write_bytes_atomic(storage.join(self.uri, name), file.read_bytes())
        except Exception as error:  # noqa: BLE001 - a store has many kinds; a profile is not worth a training
            logger.warning("rank %d: %s could not be kept in %s: %s", self.rank, name, self.uri, error)


class _HangWatch:
    """Has this process write the stacks of its threads when a step takes too long, and hands them to the driver.

    The stacks are written by faulthandler's own thread, which needs no interpreter lock; a thread of ours reads them.
    """

    def __init__(self, seconds: float, *, rank: int, put: Callable[[str], None]) -> None:
        self.seconds, self.rank, self.put = seconds, rank, put
        self._step = 0
        self._done = threading.Event()
        if seconds:
            self._file = tempfile.NamedTemporaryFile(prefix=f"lumos-stacks-{rank:05d}-", suffix=".txt")  # noqa: SIM115
            self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
            self._thread.start()

    def begin(self, step: int) -> None:
        """A step begins: the one before did not hang."""
        self._step = step
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, file=self._file)

    def close(self) -> None:
        """Nothing to watch any more."""
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
            self._done.set()
            self._thread.join()
            self._file.close()

    def _watch(self) -> None:
        seen = 0
        while not self._done.wait(min(1.0, self.seconds / 4)):
            stacks = Path(self._file.name).read_bytes()[seen:]
            if stacks:
                time.sleep(0.2)  # for the rest of them
                stacks = Path(self._file.name).read_bytes()[seen:]
                seen += len(stacks)
                text = stacks.decode(errors="replace")
                self.put(event("hang", step=self._step, rank=self.rank, seconds=self.seconds, stacks=text))


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def memory_hint(config: TrainConfig) -> str:
    """Which keys of a run would make it need less memory, the cheapest first."""
    zero = read_deepspeed_file(config.deepspeed).get("zero_optimization", {})
    stage, on_gpu = zero.get("stage", 0), config.resources.device == "gpu"
    hints = [f"lower micro_batch_tokens (now {config.micro_batch_tokens}), if a pass has several rows"]
    if config.model.recompute != "full":
        hints.append("set model.checkpoint_activations=true")
    files = [f"zero{stage + 1}{'-gpu' if on_gpu else ''}"] if stage < 3 else []
    if on_gpu and not zero.get("offload_optimizer"):
        files.append(f"zero{max(2, stage)}-offload-gpu")
    for name in files:
        with contextlib.suppress(UserError):  # what training would refuse
            check_engine(replace(config, deepspeed=name))
            hints.append(f"set deepspeed={name} (now {config.deepspeed})")
    return "To need less: " + ", or ".join([*hints, "use more workers"])


def keep_phases(folder: Path, said: dict[str, Any]) -> None:
    """Write down a line of phases that a worker sent."""
    with (folder / PHASES_FILE).open("a") as file:
        file.write(json.dumps(said) + "\n")


def keep_stacks(folder: Path, said: dict[str, Any]) -> Path:
    """Write down the stacks of a worker whose step hangs."""
    file = folder / HANGS_DIR / f"step-{said['step']:08d}" / f"rank-{said['rank']:05d}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stacks:
        stacks.write(said["stacks"])
    return file


def peak_rss() -> float:
    """Bytes that this process had in memory at its highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
