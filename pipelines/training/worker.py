"""The loop each Ray Train worker runs: restore, step, record, checkpoint, export."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import Checkpoint

from lumos.checkpoint import load_weights
from lumos.decoder import Decoder
from pipelines.streams import torch_stream
from pipelines.training.checkpoints import LoopState, restore, save
from pipelines.training.config import TrainConfig
from pipelines.training.engine import Engine, gather_weights, make_engine, prepare_process
from pipelines.training.export import ExportSpec, write_export
from pipelines.training.ingest import IngestSpec, step_batches
from pipelines.training.record import StepRecord
from pipelines.training.step import LossModule, StepBatch, StepResult, TrainStep

_PUSH_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """All a worker is told by the driver."""

    config: TrainConfig
    ingest: IngestSpec
    export: ExportSpec
    relay: Any  # handle of record.Relay
    resume_from: Checkpoint | None  # of an earlier driver; Ray Train's own latest one comes first
    threads: int


def train_worker(options: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker; ``options["job"]`` is the :class:`Job`."""
    Worker(options["job"]).run()


class Worker:
    """One worker's run from the latest checkpoint to the last step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.config = job.config
        self.rank = ray.train.get_context().get_world_rank()
        self.device = ray.train.torch.get_device()
        prepare_process(self.device, threads=job.threads)
        self.module = LossModule(self._make_model(), job.ingest.vocabulary, self.config.optimizer.z_loss_weight)
        self.engine: Engine = make_engine(self.module, self.config)
        self.done = 0  # updates made
        self.history: list[str] = []  # lines of the record, from step 1
        self.pushed = 0  # lines the driver's relay has
        self.pushed_at = time.monotonic()

    def run(self) -> None:
        """Train to the last step, or until a figure is no longer finite."""
        saved = self._restore()
        train_step = TrainStep(self.engine, self.job.ingest.vocabulary, device=self.device)
        began = time.perf_counter()
        for batch, data_wait in _timed(self._batches()):
            lr = self.config.learning_rate(batch.step)
            result = train_step(batch, lr=lr, data_wait=data_wait)
            if not result.is_finite():
                self._stop(result)
                return
            self.done = batch.step + 1
            self._record(batch, result, lr=lr, seconds=time.perf_counter() - began)
            if self.done % self.config.checkpoint.every == 0 and self.done < self.config.steps:
                self._save()
            began = time.perf_counter()
        if self.done > saved.step or not saved.exported:
            self._save_last()

    def _make_model(self) -> Decoder:
        model = Decoder(self.job.export.model)
        model.checkpoint_activations = self.config.model.checkpoint_activations
        if self.config.init_from is None:
            model.init_weights(torch_stream(self.config.seed, "init"))
        else:
            load_weights(model, self.config.init_from)
        return model

    def _restore(self) -> LoopState:
        checkpoint = ray.train.get_checkpoint() or self.job.resume_from
        if checkpoint is None:
            return self._state()
        with checkpoint.as_directory() as folder:
            found, self.history = restore(self.engine, Path(folder))
        self.done = found.step
        self.pushed = len(self.history)  # the driver takes these from the checkpoint itself
        return found

    def _batches(self) -> Iterator[StepBatch]:
        if self.done >= self.config.steps:
            return iter(())
        resources = self.config.resources
        return step_batches(
            self.job.ingest,
            rank=self.rank,
            start=self.done,
            stop=self.config.steps,
            num_cpus=resources.cpus_per_loader,
            steps_per_block=resources.steps_per_block,
            prefetch_steps=resources.prefetch_steps,
        )

    def _record(self, batch: StepBatch, result: StepResult, *, lr: float, seconds: float) -> None:
        if self.rank:
            return
        record = StepRecord(
            step=self.done,
            time=time.time(),
            epoch=batch.epoch,
            lr=lr,
            step_seconds=seconds,
            tokens_per_s=result.tokens / seconds,
            **asdict(result),
        )
        self.history.append(record.to_line())
        if time.monotonic() - self.pushed_at > _PUSH_SECONDS:
            self._push()

    def _push(self) -> None:
        """Hand the driver what it does not have yet; returns when the relay holds it."""
        if self.rank == 0:
            ray.get(self.job.relay.push.remote(self.history[self.pushed :]))
            self.pushed = len(self.history)
            self.pushed_at = time.monotonic()

    def _state(self, *, exported: bool = False) -> LoopState:
        return LoopState(
            step=self.done,
            num_workers=self.config.num_workers,
            identity_hash=self.config.identity_hash(),
            exported=exported,
        )

    def _save(self, *, export: Path | None = None, exported: bool = False) -> None:
        self._push()  # before the checkpoint can be resumed from, so that the driver misses no step of it
        save(self.engine, self._state(exported=exported), self.history, rank=self.rank, export=export)

    def _save_last(self) -> None:
        weights = gather_weights(self.module.decoder, keep=self.rank == 0)
        if self.rank:
            self._save(exported=True)
            return
        with tempfile.TemporaryDirectory(prefix="lumos-export-") as folder:
            export = Path(folder) / "export"
            write_export(export, weights, self.job.export)
            self._save(export=export, exported=True)

    def _stop(self, result: StepResult) -> None:
        """End without an error, which Ray Train would answer by trying the same steps again."""
        self._push()
        if self.rank == 0:
            reason = f"step {self.done + 1}: loss is {result.loss}, gradient norm {result.grad_norm}"
            ray.get(self.job.relay.stop.remote(reason))


def _timed(batches: Iterator[StepBatch]) -> Iterator[tuple[StepBatch, float]]:
    """Batches with the seconds spent waiting for each."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - began
