"""The record of a run, step by step: from rank 0 through a queue to the driver, which alone writes it down.

``metrics.jsonl`` in the output is the truth, with every step; MLflow receives what it says (``sender``). A step is
recorded once: what is replayed after a failure is ignored. The checkpoints carry the record up to their step, so that a
resume leaves no gap. The driver keeps no records in memory, and reads the file as a stream.

Programs older and newer than this one may have written a record: see :class:`StepRecord`.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import UserError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_CHUNK = 1000  # records held at a time
_EVENT = "event"  # the key that tells an event from a record
_REMEDY = (
    "Mend the line, or move the file away: the same command then takes the record from the last checkpoint and goes on "
    "from there"
)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of ``metrics.jsonl``.

    A field that is added needs a default, which stands for it in the lines of older programs and where it is left out.
    Keys of newer programs are kept in ``unknown`` and written back.
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
    clips: int = 0  # rows of the global batch
    bucket: str = ""  # their latent shape, TxHxW
    datasets: Mapping[str, int] = field(default_factory=dict, hash=False)  # rows by dataset, where there are several
    cut_captions: int = 0  # captions that did not fit
    longest_caption: int = 0  # in such a step: tokens of the longest prompt, before it was cut
    skipped: int = 0  # 1: the update was left out, since loss or gradients were not finite
    workers: int = 0  # that took part
    phases: Mapping[str, float] = field(default_factory=dict, hash=False)  # seconds of rank 0, by part of the step
    memory_gb: float = 0.0  # peak of rank 0's device since its start; absent on CPU
    rss_gb: float = 0.0  # peak resident memory of rank 0's process
    checkpoint_seconds: float = 0.0  # spent on saving since the record before
    val_loss: float | None = None  # of the held-out rows, in steps that end with a validation
    val_frame_losses: tuple[float, ...] = ()
    val_tokens: int = 0  # over which it was taken
    val_seconds: float = 0.0
    unknown: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_line(self) -> str:
        """The record as a line of JSON."""
        values = vars(self)
        known = {
            name: values[name]
            for name, default in _defaults(cast(Hashable, type(self))).items()
            if values[name] != default
        }
        return json.dumps(known | dict(self.unknown))

    @classmethod
    def from_line(cls, line: str | bytes) -> "StepRecord":
        """Inverse of :meth:`to_line`.

        Raises:
            ValueError: if the line is cut off or of another kind.
        """
        try:
            return cls._of(json.loads(line))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the record of a step: {line[:80]!r}") from error

    @classmethod
    def _of(cls, raw: dict[str, Any]) -> "StepRecord":
        names = _defaults(cast(Hashable, cls))
        known = {name: value for name, value in raw.items() if name in names}
        for name in ("frame_losses", "val_frame_losses"):
            if name in known:
                known[name] = tuple(known[name])
        unknown = {name: value for name, value in raw.items() if name not in names}
        return cls(**known, unknown=unknown)


@cache
def _defaults(cls: Any) -> dict[str, Any]:
    """The fields that are written down, with the value at which each is left out."""
    return {
        each.name: each.default_factory() if each.default_factory is not MISSING else each.default
        for each in fields(cls)
        if each.name != "unknown"
    }


class History:
    """``metrics.jsonl``: steps 1, 2, 3, ... each once, read as a stream.

    A last line that a kill cut off is dropped when the file is opened; every other line stays as it is.

    Raises:
        UserError: if any other line is not the record of its step. The file is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_step = 0  # recorded; 0 before the first
        self._size = 0  # bytes of whole lines
        self._mark = (0, 0)  # a step, and where its line ends: where reading went to last
        if path.exists():
            self._open()

    def _open(self) -> None:
        tail = b""
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    tail = line
                    break
                self._accept(line)
        if _is_json(tail):
            self._accept(tail)
            with self.path.open("ab") as file:
                file.write(b"\n")
            self._size += 1
        elif tail:
            os.truncate(self.path, self._size)

    def _accept(self, line: bytes) -> None:
        self.last_step += 1
        check_record(line, self.last_step, f"{self.path}, line {self.last_step}", remedy=_REMEDY)
        self._size += len(line)

    def add(self, records: Iterable[StepRecord]) -> list[StepRecord]:
        """Append the records that are new and return them; replayed steps are left out.

        Raises:
            ValueError: if steps are missing before a record.
            OSError: if they cannot be written. The file is as before, and they may be added again.
        """
        new: list[StepRecord] = []
        for record in records:
            last = new[-1].step if new else self.last_step
            if record.step > last + 1:
                raise ValueError(f"{self.path} ends at step {last}; the record of step {record.step} leaves a gap")
            if record.step == last + 1:
                new.append(record)
        if new:
            self._append("".join(record.to_line() + "\n" for record in new).encode())
            self.last_step = new[-1].step
        return new

    def take_over(self, records: Iterable[StepRecord]) -> None:
        """As :meth:`add`, for any number of records, of which few are held at a time."""
        remaining = iter(records)
        while chunk := list(islice(remaining, _CHUNK)):
            self.add(chunk)

    def read(self, after: int = 0) -> Iterator[StepRecord]:
        """The records after a step, in order, up to the last at the time of the call.

        To go on where the reading before ended costs nothing. One thread may read.
        """
        step, offset = self._mark if self._mark[0] <= after else (0, 0)
        last = self.last_step
        if last <= after:
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            while step < last:
                line = file.readline()
                step, offset = step + 1, offset + len(line)
                if step > after:
                    self._mark = (step, offset)
                    yield StepRecord.from_line(line)

    def _append(self, data: bytes) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if self.path.exists():
                os.truncate(self.path, self._size)
            raise
        self._size += len(data)


def check_record(line: str | bytes, step: int, where: str, *, remedy: str) -> StepRecord:
    """The record in a line, which must be that of a step.

    Raises:
        UserError: if it is not; the message says where it is, and the remedy.
    """
    try:
        record = StepRecord.from_line(line)
        if record.step != step:
            raise ValueError(f"the record of step {record.step}, not of step {step}")
    except ValueError as error:
        raise UserError(f"{where}: {error}. {remedy}") from error
    return record


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def event(kind: str, **values: Any) -> str:
    """A line for the queue that is no record: something that the driver is to know."""
    return json.dumps({_EVENT: kind, **values})


def open_queue() -> Queue:
    """A queue for lines of the record, on this node, living as long as this process."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": node})


@dataclass(kw_only=True)
class Recorder:
    """Follows a queue in a thread of the driver and writes down what comes, within a block.

    What cannot be written for want of space or the like is kept, and tried again with a warning. Whatever else goes
    wrong, a broken queue or a line that is no record, leaves a gap that only a resume from a checkpoint closes: then
    ``on_failure`` is called at once, in the thread, and ``failure`` says why.
    """

    queue: Queue  # of lines, from the workers
    history: History  # where records are written down
    on_record: Callable[[StepRecord], None]  # called with each new record; if it fails, it is told once and goes on
    on_event: Callable[[dict[str, Any]], None]  # called with each event; likewise
    on_failure: Callable[[], None]  # ends the training

    def __post_init__(self) -> None:
        self.failure: BaseException | None = None
        self._waiting: list[StepRecord] = []  # records that could not be written yet
        self._warned: set[str] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="recorder", daemon=True)

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            while not self._done.wait(_POLL_SECONDS):
                self._take()
            self._take()
            if self._waiting:
                self.history.add(self._waiting)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the main thread
            self.failure = error
            if not self._done.is_set():
                self.on_failure()

    def _take(self) -> None:
        for line in self.queue.get_nowait_batch(self.queue.qsize()):  # nobody else takes from it
            raw = json.loads(line)
            if _EVENT in raw:
                self._call("what a worker said", self.on_event, raw)
            else:
                self._waiting.append(StepRecord.from_line(line))
        try:
            new = self.history.add(self._waiting)
        except OSError as error:
            self._warn(f"{self.history.path} cannot be written, which is tried again; training goes on: {error}")
            return
        self._waiting = []
        for record in new:
            self._call("the progress", self.on_record, record)

    def _call(self, what: str, callback: Callable[[Any], None], value: Any) -> None:
        try:
            callback(value)
        except Exception as error:  # noqa: BLE001 - it only shows; the record is complete without
            self._warn(f"{what} could not be shown or kept ({type(error).__name__}: {error}); training goes on")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)
