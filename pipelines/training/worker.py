"""The loop each Ray Train worker runs: restore, step, record, checkpoint, export."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.queue import Queue

from lumos.decoder import Decoder
from lumos.losses import LossModule
from pipelines.errors import JobError, UserError, in_words
from pipelines.memory import give_back_large_buffers
from pipelines.training.checkpoints import (
    MODEL_FILE,
    STATE_FILE,
    TEXT_TOKENIZER_FILE,
    LoopState,
    ModelFile,
    find_checkpoints,
    read_state,
)
from pipelines.training.diagnosis import Diagnosis
from pipelines.training.ema import forget_average, update_average
from pipelines.training.engine import Engine, autocast_dtype, make_engine, prepare_process
from pipelines.training.engine_files import ENGINE_DIR, EngineFiles, load_engine, older_order
from pipelines.training.ingest import step_batches
from pipelines.training.initialize import build_decoder
from pipelines.training.prepare import PreparedRun
from pipelines.training.record import StepRecord, event
from pipelines.training.saving import CheckpointWriter
from pipelines.training.scratch import folder_of_node
from pipelines.training.step import StepBatch, StepResult, TrainStep
from pipelines.training.validate import Validator

_PUSH_SECONDS = 0.5
_PREEMPTION_SECONDS = 10.0  # between looks for a node that is about to be taken away
_ORDER_SECONDS = 0.2  # between two looks for an order to stop
_STOP, _LOOK = 1, 2  # signals of rank 0 to all
# What follows from config, data and memory, and so comes again on another try.
_SURE = (MemoryError, NotImplementedError, TypeError, UserError, ValueError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Job:
    """All a worker is told by the driver."""

    run: PreparedRun
    identity_hash: str
    storage: str  # folder or URI of the run's checkpoints
    attempt: str  # folder in it for those of this driver
    records: Queue | None  # takes lines of the record, for the driver; None: nobody does
    orders: Queue | None  # anything in it: save a checkpoint and stop
    resume_from: str | None  # a checkpoint of an earlier driver; those of the attempt come first
    threads: int
    diagnosis_uri: str  # folder for profiles, which every node reaches


@dataclass(frozen=True)
class Stopped:
    """That training ended as it was asked to."""

    step: int
    saved: bool  # a checkpoint of that step


def train_worker(options: dict[str, Any]) -> Any:
    """Entry point of a Ray Train worker; ``options["job"]`` is the :class:`Job`.

    Returns:
        Why training ended early, or None; an error Ray Train would answer by trying the same steps again.
    """
    job: Job = options["job"]
    worker: Worker | None = None
    try:
        worker = Worker(job)
        return worker.run()
    except Exception as error:
        if isinstance(error, _SURE):  # it would come again
            _tell_fatal(job, error, step=worker.done + 1 if worker else None)
        raise


class Worker:
    """One worker's run from the latest checkpoint to the last step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.config = job.run.config
        self.rank = ray.train.get_context().get_world_rank()
        self.device = ray.train.torch.get_device()
        prepare_process(self.device, threads=job.threads)
        if self.config.model.checkpoint_activations:  # memory is short
            give_back_large_buffers()
        self.module = LossModule(
            self._make_model(),
            job.run.vocabulary,
            self.config.optimizer.z_loss_weight,
            text_loss_weight=self.config.optimizer.text_loss_weight,
            autocast=autocast_dtype(self.config),
        )
        self.engine: Engine = make_engine(self.module, self.config)
        self.done = 0  # steps
        self.skipped_in_a_row = 0  # of them, at the end
        self.diagnosis = Diagnosis(
            self.config, rank=self.rank, device=self.device, uri=job.diagnosis_uri, put=self._tell
        )
        self.validator = Validator(job.run, rank=self.rank, device=self.device)
        self.lines: list[str] = []  # of the record, since the last checkpoint
        self.pushed = 0  # of them, those the driver has
        self.pushed_at = self.looked_at = self.asked_at = time.monotonic()
        self.preempted: float | None = None  # deadline of a preemption that was saved for
        model = ModelFile(config=job.run.model, vocabulary=job.run.vocabulary, info=job.run.info)
        self.writer = CheckpointWriter(
            uri=job.storage,
            attempt=job.attempt,
            options=self.config.checkpoint,
            device=self.device,
            files={MODEL_FILE: model.to_json(), TEXT_TOKENIZER_FILE: job.run.text_tokenizer},
            tell=lambda kind, **values: self._tell(event(kind, **values)),
        )

    def run(self) -> "str | Stopped | None":
        """Train to the last step, or until too many in a row were skipped: what the last one's figures were."""
        try:
            self._restore()
            self._tell_start()
            return self._train()
        finally:
            self.diagnosis.close()
            self.writer.close()

    def _train(self) -> "str | Stopped | None":
        clock = self.diagnosis.clock
        train_step = TrainStep(self.engine, self.job.run.vocabulary, device=self.device, clock=clock)
        began, saved = time.perf_counter(), self.done == self.config.steps
        for batch, data_wait in _timed(
            step_batches(self.job.run, rank=self.rank, num_workers=dist.get_world_size(), start=self.done)
        ):
            lr = self.config.optimizer.learning_rate(batch.step, self.config.steps)
            clock.add("data", data_wait)
            train_step.signal = float(self._signal())
            with self.diagnosis.step(batch.step + 1):
                result = train_step(batch, lr=lr, data_wait=data_wait)
            if self.config.ema is not None and not result.skipped:
                update_average(self.engine, self.config.ema, step=batch.step)
            self.done = batch.step + 1
            seconds = time.perf_counter() - began
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
            validation = self.validator(self.engine) if self.validator.due(self.done) else {}
            self._record(batch, result, lr=lr, seconds=seconds, validation=validation)
            if self.skipped_in_a_row > self.config.max_skipped_in_a_row:
                self._push()
                self.writer.settle()
                return f"step {self.done}: loss {result.loss}, gradient norm {result.grad_norm}"
            saved = False
            signal = int(train_step.signal)
            if signal & _STOP and self.done < self.config.steps:
                return Stopped(self.done, saved=self._save(wait=True))
            if signal & _LOOK and self._preemption():
                self._save(wait=True)
            elif self.done % self.config.checkpoint.every == 0 and self.done < self.config.steps:
                self._save(wait=False)
            else:
                self.writer.poll()
            began = time.perf_counter()
        self.writer.settle()
        if not saved and not self._save(wait=True):
            raise JobError(f"the last checkpoint, of step {self.done}, could not be written")
        return None

    def _make_model(self) -> Decoder:
        run = self.job.run
        train_text = run.config.optimizer.text_loss_weight > 0
        model = build_decoder(run.config, run.model, run.vocabulary, device=self.device, train_text=train_text)
        model.recompute = self.config.model.recompute
        if self.config.model.compile:
            model.compile_blocks()
        return model

    def _restore(self) -> None:
        """Load the newest checkpoint, if there is one."""
        newest = self._newest_checkpoint()
        if newest is None:
            return
        with folder_of_node(newest, self.writer.scratch) as folder:
            load_engine(self.engine, EngineFiles(folder / ENGINE_DIR, order=older_order(self.engine)))
            found = read_state((folder / STATE_FILE).read_bytes(), newest)
        if self.config.ema is None or found.step <= self.config.ema.start:
            forget_average(self.engine)
        self.done, self.skipped_in_a_row = found.step, found.skipped_in_a_row

    def _newest_checkpoint(self) -> str | None:
        """Where it is. Of this driver's, Ray Train may not know the last one yet when it starts workers again."""
        newest = [self.job.resume_from]
        if self.rank == 0:
            own = [s.uri for s in find_checkpoints(self.job.storage) if f"/{self.job.attempt}/" in s.uri]
            newest = [*own, *newest][:1]
        dist.broadcast_object_list(newest, src=0, device=self.device)
        return newest[0]

    def _record(
        self, batch: StepBatch, result: StepResult, *, lr: float, seconds: float, validation: dict[str, Any]
    ) -> None:
        figures = self.diagnosis.figures(self.done)
        if self.rank:
            return
        record = StepRecord(
            step=self.done,
            time=time.time(),
            epoch=batch.epoch,
            lr=lr,
            step_seconds=seconds,
            tokens_per_s=result.tokens / seconds,
            workers=dist.get_world_size(),
            datasets={self.job.run.dataset_names[batch.dataset]: batch.rows} if len(self.job.run.datasets) > 1 else {},
            **asdict(result),
            **figures,
            **validation,
        )
        self.lines.append(record.to_line())
        if time.monotonic() - self.pushed_at > _PUSH_SECONDS:
            self._push()

    def _signal(self) -> int:
        """What rank 0 has to say to all workers in the next step."""
        now, signal = time.monotonic(), 0
        if self.rank:
            return signal
        if now - self.looked_at > _PREEMPTION_SECONDS:
            self.looked_at, signal = now, _LOOK
        if self.job.orders is not None and now - self.asked_at > _ORDER_SECONDS:
            self.asked_at = now
            if not self.job.orders.empty():  # a call of another process
                signal |= _STOP
        return signal

    def _preemption(self) -> bool:
        """Whether a node of a worker is about to be taken away, and no checkpoint was made for that yet."""
        info = ray.train.get_preemption_info()
        deadline = None if info is None else float(info.deadline_ms or 0)
        found = deadline is not None and deadline != self.preempted
        self.preempted = deadline
        return found

    def _push(self) -> None:
        """Hand the driver what it does not have yet; returns when the queue holds it."""
        if self.rank == 0 and self.job.records is not None:
            self.job.records.put_nowait_batch(self.lines[self.pushed :])
            self.pushed = len(self.lines)
            self.pushed_at = time.monotonic()

    def _tell(self, line: str) -> None:
        """Hand the driver a line at once, without waiting for it."""
        if self.job.records is not None:
            actor: Any = self.job.records.actor
            actor.put_nowait.remote(line)

    def _tell_start(self) -> None:
        if self.rank == 0:
            device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
            workers = dist.get_world_size()
            self._tell(event("start", step=self.done, time=time.time(), device=device, workers=workers))

    def _save(self, *, wait: bool) -> bool:
        """Save a checkpoint; with ``wait``, it is in storage afterwards. Whether it was written."""
        self._push()  # before the checkpoint can be resumed from, so that the driver misses no step of it
        state = LoopState(
            step=self.done,
            skipped_in_a_row=self.skipped_in_a_row,
            num_workers=dist.get_world_size(),
            identity_hash=self.job.identity_hash,
        )
        with self.diagnosis.clock("checkpoint"):
            written = self.writer.save(self.engine, state, self.lines, wait=wait)
        if written:
            self.lines, self.pushed = [], 0
        return written


def _tell_fatal(job: Job, error: Exception, *, step: int | None) -> None:
    """Tell the driver of an error that would come again, and wait until it has heard; without step, of the start."""
    if job.records is not None:
        rank = ray.train.get_context().get_world_rank()
        job.records.put(event("fatal", rank=rank, step=step, cause=in_words(error)))


def _timed(batches: Iterator[StepBatch]) -> Iterator[tuple[StepBatch, float]]:
    """Batches with the seconds spent waiting for each."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - began
