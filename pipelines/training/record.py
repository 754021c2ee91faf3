"""The record of a run, step by step: from rank 0 through a queue to the driver, which alone writes it down.

``metrics.jsonl`` in the output is the truth; MLflow receives what it says. A step is recorded once: what is replayed
after a failure is ignored. Every checkpoint carries the record up to its step, so that a resume leaves no gap.

Programs older and newer than this one may have written a record: see :class:`StepRecord`.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import UserError
from pipelines.tracking import MetricRow, Tracker

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_NO_METRICS = {"step", "time", "frame_losses", "tokens", "masked_tokens", "unknown"}  # all other fields are sent
_REMEDY = (
    "Mend the line, or move the file away: the same command then takes the record from the last checkpoint and goes on "
    "from there"
)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of ``metrics.jsonl``.

    A field that is added needs a default, which stands for it in the lines of older programs. Keys of newer programs
    are kept in ``unknown`` and written back.
    """

    step: int  # 1-based: updates made so far
    time: float  # seconds since the epoch, at the end of the step
    loss: float
    frame_losses: tuple[float, ...]
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    step_seconds: float
    data_wait: float  # seconds of the step spent waiting for data
    masked_share: float
    masked_tokens: int
    epoch: int
    unknown: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_line(self) -> str:
        """The record as a line of JSON."""
        known = asdict(self)
        unknown = known.pop("unknown")
        return json.dumps(known | unknown)

    @classmethod
    def from_line(cls, line: str | bytes) -> "StepRecord":
        """Inverse of :meth:`to_line`.

        Raises:
            ValueError: if the line is cut off or of another kind.
        """
        names = {each.name for each in fields(cls)} - {"unknown"}
        try:
            raw = json.loads(line)
            known = {name: value for name, value in raw.items() if name in names}
            known["frame_losses"] = tuple(raw["frame_losses"])
            return cls(**known, unknown={name: value for name, value in raw.items() if name not in names})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the record of a step: {line[:80]!r}") from error

    def metrics(self) -> MetricRow:
        """The record as MLflow metrics."""
        values = {name: float(value) for name, value in vars(self).items() if name not in _NO_METRICS}
        values |= {f"loss_frame_{index}": loss for index, loss in enumerate(self.frame_losses)}
        return MetricRow(step=self.step, time=self.time, values=values)


class History:
    """``metrics.jsonl``: steps 1, 2, 3, ... each once.

    A last line that a kill cut off is dropped when the file is opened; every other line stays as it is.

    Raises:
        UserError: if any other line is not the record of its step. The file is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[StepRecord] = []
        if path.exists():
            *lines, tail = path.read_bytes().split(b"\n")
            tail_is_whole = _is_json(tail)
            lines += [tail] if tail_is_whole else []
            self.records = read_records(lines, str(path), remedy=_REMEDY)
            if tail_is_whole:
                with path.open("ab") as file:
                    file.write(b"\n")
            else:
                os.truncate(path, path.stat().st_size - len(tail))

    @property
    def last_step(self) -> int:
        """The last step recorded, 0 before the first."""
        return self.records[-1].step if self.records else 0

    def add(self, records: Iterable[StepRecord]) -> list[StepRecord]:
        """Append the records that are new and return them; replayed steps are left out.

        Raises:
            ValueError: if steps are missing before a record.
        """
        new: list[StepRecord] = []
        for record in records:
            last = new[-1].step if new else self.last_step
            if record.step > last + 1:
                raise ValueError(f"{self.path} ends at step {last}; the record of step {record.step} leaves a gap")
            if record.step == last + 1:
                new.append(record)
        if new:
            with self.path.open("a") as file:
                file.writelines(record.to_line() + "\n" for record in new)
                file.flush()
                os.fsync(file.fileno())
            self.records += new
        return new


def read_records(lines: Iterable[str | bytes], where: str, *, remedy: str) -> list[StepRecord]:
    """The records of the steps 1, 2, 3, ... in as many whole lines.

    Raises:
        UserError: if a line is not the record of its step; the message says where it is, and the remedy.
    """
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = StepRecord.from_line(line)
            if record.step != number:
                raise ValueError(f"the record of step {record.step}, not of step {number}")
        except ValueError as error:
            raise UserError(f"{where}, line {number}: {error}. {remedy}") from error
        records.append(record)
    return records


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def open_queue() -> Queue:
    """A queue for lines of the record, on this node, living as long as this process."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": node})


@dataclass(kw_only=True)
class Recorder:
    """Follows a queue in a thread of the driver: history, MLflow, progress.

    MLflow being out of reach does not end a training: what could not be sent is sent later, at the latest on leaving.
    """

    queue: Queue  # of lines, from rank 0
    history: History  # where records are written down
    tracker: Tracker  # where they are sent
    flush_seconds: float  # between two batches sent
    sent: int  # steps sent so far, at first by an earlier driver
    on_record: Callable[[StepRecord], None]  # called with each new record
    on_sent: Callable[[int], None]  # called with the number of steps sent so far

    def __post_init__(self) -> None:
        self._failure: Exception | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="recorder", daemon=True)

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._try_send()

    def finish(self) -> None:
        """After leaving: make sure that nothing was lost.

        Raises:
            Exception: whatever made following or sending fail.
        """
        if self._failure is not None:
            raise self._failure
        self._send()

    def _follow(self) -> None:
        flushed = time.monotonic()
        try:
            while not self._done.wait(_POLL_SECONDS):
                self._take()
                if time.monotonic() - flushed >= self.flush_seconds:
                    self._try_send()
                    flushed = time.monotonic()
            self._take()
        except Exception as error:  # noqa: BLE001 - raised again in the main thread by finish()
            self._failure = error

    def _take(self) -> None:
        lines = self.queue.get_nowait_batch(self.queue.qsize())  # nobody else takes from it
        for record in self.history.add(map(StepRecord.from_line, lines)):
            self.on_record(record)

    def _try_send(self) -> None:
        try:
            self._send()
        except Exception as error:  # noqa: BLE001 - an unreachable server has many kinds; it is tried again
            logger.warning("MLflow could not be written, which is tried again: %s", error)

    def _send(self) -> None:
        pending = self.history.records[self.sent :]
        if pending:
            self.tracker.log_metrics([record.metrics() for record in pending])
            self.sent = pending[-1].step
            self.on_sent(self.sent)
