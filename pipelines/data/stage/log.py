"""What a run is doing and took: a small file beside the dataset that `lumos data status` reads, and Ray's metrics.

Nothing of it enters a ledger or a snapshot.
"""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice
from typing import Any

import psutil
from ray.util import metrics

from pipelines import storage

RUNS = "runs"
_RECENT = 50  # runs that are looked through
_WRITE_SECONDS = 2.0  # between writes of the file while a stage goes on


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What a worker tells of a batch that it has committed."""

    inputs: int  # done
    outputs: int  # rows written
    failed: int  # of these
    first_failure: str  # or ""
    busy_s: float  # seconds the batch took
    source_s: float  # seconds of video it was about
    work: float  # in the stage's own measure (bytes or seconds of video)

    def publish(self, stage: str) -> None:
        """Add it to the metrics that Ray offers to Prometheus."""
        tags = {"stage": stage}
        counters, duration = _metrics()
        for name, counter in counters.items():
            if value := getattr(self, name):
                counter.inc(value, tags=tags)
        duration.observe(self.busy_s, tags=tags)


@lru_cache(maxsize=1)
def _metrics() -> tuple[dict[str, metrics.Counter], metrics.Histogram]:
    texts = {
        "inputs": "inputs computed and committed",
        "outputs": "rows committed",
        "failed": "rows that hold a failure",
        "source_s": "seconds of video worked on",
        "busy_s": "seconds of work",
    }
    counters = {
        name: metrics.Counter(f"lumos_data_{name}", description=f"Curation: {text}", tag_keys=("stage",))
        for name, text in texts.items()
    }
    duration = metrics.Histogram(
        "lumos_data_batch_s",
        description="Curation: seconds that a batch took",
        boundaries=[0.1, 1, 10, 60, 600, 3600],
        tag_keys=("stage",),
    )
    return counters, duration


@dataclass(kw_only=True)
class StageProgress:
    """How far one stage of a run is."""

    total: int  # inputs
    before: int  # of these, done by earlier runs
    computed: int = 0  # done by this run
    failed: int = 0  # rows of those that hold a failure
    seconds: float = 0.0  # of the clock, so far
    busy_s: float = 0.0  # of work, summed over the processes
    source_s: float = 0.0  # seconds of video that this run's work was about
    work: float = 0.0  # how much of the pending work is done, in the stage's own measure (as ``BatchReport``)
    work_total: float = 0.0  # all of the pending work in that measure; 0 where inputs name none

    def add(self, report: BatchReport, seconds: float) -> None:
        """Count a batch that was committed so many seconds after the begin."""
        self.computed += report.inputs
        self.failed += report.failed
        self.busy_s += report.busy_s
        self.source_s += report.source_s
        self.work += report.work
        self.seconds = seconds

    @property
    def pending(self) -> int:
        """Inputs left."""
        return self.total - self.before - self.computed

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None before anything is done."""
        if self.pending == 0:
            return 0.0
        share = self.work / self.work_total if self.work_total else self.computed / (self.total - self.before)
        return self.seconds * (1 / share - 1) if share > 0 else None

    def __str__(self) -> str:
        """A line for a person."""
        parts = [f"{self.before + self.computed} of {self.total} done"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.seconds:
            parts.append(f"{self.computed / self.seconds:.3g} a second")
        if self.seconds and self.source_s:
            parts.append(f"{self.source_s / self.seconds:.3g} s of video a second")
        if self.pending and self.seconds_left is not None:
            left = str(timedelta(seconds=round(self.seconds_left))).replace(",", "")  # beyond a day it has a comma
            parts.append(f"{left} left")
        return ", ".join(parts)


class RunLog:
    """The file of one run: ``runs/<start>-<random>.json`` in the dataset."""

    def __init__(self, dataset: str) -> None:
        now = datetime.now(UTC)
        self.uri = storage.join(dataset, RUNS, f"{now:%Y%m%dT%H%M%S.%f}-{secrets.token_hex(3)}.json")
        self.stages: dict[str, StageProgress] = {}
        self._head = {"started": now.isoformat("T", "seconds"), "host": socket.gethostname(), "pid": os.getpid()}
        self._written = 0.0

    def update(self, stage: str, progress: StageProgress, *, write: bool = False) -> None:
        """Note how far a stage is; the file follows within seconds, or at once."""
        self.stages[stage] = progress
        if write or time.monotonic() - self._written > _WRITE_SECONDS:
            self.write("running")

    def write(self, state: str) -> None:
        """Write the file: "running", "done" or "stopped"."""
        # A list, in the order of the work.
        stages = [{"name": name, **asdict(progress)} for name, progress in self.stages.items()]
        updated = datetime.now(UTC).isoformat("T", "seconds")
        storage.write_json_atomic(self.uri, {**self._head, "updated": updated, "state": state, "stages": stages})
        self._written = time.monotonic()

    @contextmanager
    def record(self) -> Iterator["RunLog"]:
        """Write the file at the end of the block, whichever way it ends (but for SIGKILL)."""
        try:
            yield self
        except BaseException:
            with suppress(OSError):  # such as the full disk that stopped the run
                self.write("stopped")
            raise
        self.write("done")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The file of a run, read back."""

    started: str
    updated: str
    state: str
    host: str
    pid: int
    stages: dict[str, StageProgress]

    def __str__(self) -> str:
        """Lines for a person."""
        is_gone = self.host == socket.gethostname() and not psutil.pid_exists(self.pid)
        state = "ended without a word" if self.state == "running" and is_gone else self.state
        head = f"last run: {state}, began {self.started} on {self.host} (pid {self.pid}), seen {self.updated}"
        return "\n".join([head, *(f"  {name:10s} {progress}" for name, progress in self.stages.items())])


def last_run(dataset: str) -> RunRecord | None:
    """The newest run of a dataset, or None."""
    return next(_runs(dataset), None)


def stage_timings(dataset: str) -> dict[str, tuple[str, StageProgress]]:
    """Of each stage, when the last run that had something to do for it began, and what it took; of recent runs."""
    found: dict[str, tuple[str, StageProgress]] = {}
    for run in islice(_runs(dataset), _RECENT):
        for name, progress in run.stages.items():
            if progress.computed and name not in found:
                found[name] = (run.started, progress)
    return found


def _runs(dataset: str) -> Iterator[RunRecord]:
    """From the newest on."""
    folder = storage.join(dataset, RUNS)
    for name in reversed([name for name in storage.list_names(folder) if name.endswith(".json")]):
        found: dict[str, Any] = storage.read_json(storage.join(folder, name))
        stages = {values.pop("name"): StageProgress(**values) for values in found.pop("stages")}
        yield RunRecord(**found, stages=stages)
