"""The loop each Ray Train worker runs: restore, step, record, checkpoint, export."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from ray.util.queue import Queue
from torch import Tensor

from lumos.checkpoint import save_checkpoint
from lumos.decoder import Decoder
from lumos.losses import LossModule
from pipelines.training.checkpoints import EXPORT_DIR, LoopState, restore, save
from pipelines.training.diagnosis import Diagnosis
from pipelines.training.engine import Engine, autocast_dtype, gather_weights, make_engine, prepare_process
from pipelines.training.ingest import step_batches
from pipelines.training.initialize import build_decoder
from pipelines.training.prepare import PreparedRun
from pipelines.training.record import StepRecord, event
from pipelines.training.step import StepBatch, StepResult, TrainStep
from pipelines.training.validate import Validator

_PUSH_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """All a worker is told by the driver."""

    run: PreparedRun
    records: Queue  # takes lines of the record, for the driver
    resume_from: Checkpoint | None  # of an earlier driver; Ray Train's own latest one comes first
    threads: int
    diagnosis_uri: str  # folder for profiles, which every node reaches


def train_worker(options: dict[str, Any]) -> Any:
    """Entry point of a Ray Train worker; ``options["job"]`` is the :class:`Job`.

    Returns:
        Why training ended early, or None; an error Ray Train would answer by trying the same steps again.
    """
    return Worker(options["job"]).run()


class Worker:
    """One worker's run from the latest checkpoint to the last step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.config = job.run.config
        self.rank = ray.train.get_context().get_world_rank()
        self.device = ray.train.torch.get_device()
        prepare_process(self.device, threads=job.threads)
        self.module = LossModule(
            self._make_model(),
            job.run.vocabulary,
            self.config.optimizer.z_loss_weight,
            autocast=autocast_dtype(self.config),
        )
        self.engine: Engine = make_engine(self.module, self.config)
        self.done = 0  # steps
        self.skipped_in_a_row = 0  # of them, at the end
        self.diagnosis = Diagnosis(
            self.config, rank=self.rank, device=self.device, uri=job.diagnosis_uri, put=self._tell
        )
        self.validator = Validator(job.run, rank=self.rank, device=self.device)
        self.history: list[str] = []  # lines of the record, from step 1
        self.pushed = 0  # lines the driver has, or finds in the checkpoint
        self.pushed_at = time.monotonic()

    def run(self) -> str | None:
        """Train to the last step, or until too many in a row were skipped: what the last one's figures were."""
        exported = self._restore()
        self._tell_start()
        clock = self.diagnosis.clock
        train_step = TrainStep(self.engine, self.job.run.vocabulary, device=self.device, clock=clock)
        began = time.perf_counter()
        for batch, data_wait in _timed(step_batches(self.job.run, rank=self.rank, start=self.done)):
            lr = self.config.optimizer.learning_rate(batch.step, self.config.steps)
            clock.add("data", data_wait)
            with self.diagnosis.step(batch.step + 1):
                result = train_step(batch, lr=lr, data_wait=data_wait)
            self.done = batch.step + 1
            seconds = time.perf_counter() - began
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
            validation = self.validator(self.engine) if self.validator.due(self.done) else {}
            self._record(batch, result, lr=lr, seconds=seconds, validation=validation)
            if self.skipped_in_a_row > self.config.max_skipped_in_a_row:
                self._push()
                return f"step {self.done}: loss {result.loss}, gradient norm {result.grad_norm}"
            if self.done % self.config.checkpoint.every == 0 and self.done < self.config.steps:
                self._save()
            exported = False
            began = time.perf_counter()
        self.diagnosis.close()
        if not exported:
            self._save(gather_weights(self.module.decoder, keep=self.rank == 0))
        return None

    def _make_model(self) -> Decoder:
        run = self.job.run
        model = build_decoder(run.config, run.model, run.vocabulary, device=self.device)
        model.recompute = "full" if self.config.model.checkpoint_activations else "none"
        return model

    def _restore(self) -> bool:
        """Load the latest checkpoint, if there is one; returns whether it holds the finished model."""
        checkpoint = ray.train.get_checkpoint() or self.job.resume_from
        if checkpoint is None:
            return False
        with checkpoint.as_directory() as folder:
            found, self.history = restore(self.engine, Path(folder))
        self.done, self.skipped_in_a_row = found.step, found.skipped_in_a_row
        self.pushed = len(self.history)  # the driver takes these from the checkpoint itself
        return found.exported

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
            **asdict(result),
            **figures,
            **validation,
        )
        self.history.append(record.to_line())
        if time.monotonic() - self.pushed_at > _PUSH_SECONDS:
            self._push()

    def _push(self) -> None:
        """Hand the driver what it does not have yet; returns when the queue holds it."""
        if self.rank == 0:
            self.job.records.put_nowait_batch(self.history[self.pushed :])
            self.pushed = len(self.history)
            self.pushed_at = time.monotonic()

    def _tell(self, line: str) -> None:
        """Hand the driver a line at once, without waiting for it."""
        actor: Any = self.job.records.actor
        actor.put_nowait.remote(line)

    def _tell_start(self) -> None:
        if self.rank == 0:
            device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
            workers = dist.get_world_size()
            self._tell(event("start", step=self.done, time=time.time(), device=device, workers=workers))

    def _save(self, weights: dict[str, Tensor] | None = None) -> None:
        """Save a checkpoint; with the finished model, if its weights are given, which rank 0 alone has."""
        self._push()  # before the checkpoint can be resumed from, so that the driver misses no step of it
        folder, run = Path(tempfile.mkdtemp(prefix="lumos-checkpoint-")), self.job.run
        if weights:
            save_checkpoint(
                folder / EXPORT_DIR,
                self.module.decoder,
                run.vocabulary,
                state=weights,
                info=run.info,
                text_tokenizer=run.text_tokenizer,
            )
        state = LoopState(
            step=self.done,
            skipped_in_a_row=self.skipped_in_a_row,
            num_workers=self.config.num_workers,
            identity_hash=self.config.identity_hash(),
            exported=weights is not None,
        )
        with self.diagnosis.clock("checkpoint"):
            save(self.engine, state, self.history, folder, rank=self.rank)
        if self.rank == 0:
            self._tell(event("checkpoint", step=self.done))


def _timed(batches: Iterator[StepBatch]) -> Iterator[tuple[StepBatch, float]]:
    """Batches with the seconds spent waiting for each."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - began
