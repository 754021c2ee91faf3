"""A training run from the driver's side: check, start or continue, follow, finish."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from tqdm import tqdm

from lumos.config import SamplingConfig
from pipelines import storage
from pipelines.cluster import Waiting, connect, held_by_others, joining
from pipelines.errors import JobError, UserError, storage_errors_as
from pipelines.tracking import TrackingStore
from pipelines.training import sampling_choice, validate
from pipelines.training.checkpoints import StoredCheckpoint, find_checkpoints, prune
from pipelines.training.config import TrainConfig
from pipelines.training.diagnosis import keep_phases, keep_stacks
from pipelines.training.export import export, has_ema
from pipelines.training.launch import (
    check_cluster,
    fit_with_patience,
    interruptible,
    make_job,
    processes_of,
    reason_of,
    saved_on_sigterm,
)
from pipelines.training.output import EMA_EXPORT, Output
from pipelines.training.precision import slow_precision
from pipelines.training.prepare import PreparedRun, prepare
from pipelines.training.progress import Progress
from pipelines.training.record import History, Recorder, StepRecord, open_queue
from pipelines.training.resume import Beginning, describe_fork, find_beginning, held, take_over_record
from pipelines.training.rows import clips_of_step
from pipelines.training.sample import Sampler
from pipelines.training.sampling_choice import recommend
from pipelines.training.sender import Sender
from pipelines.training.worker import Stopped

_OPENING_SECONDS = 60.0  # that the start waits for MLflow, beside joining Ray; then training begins without


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    output: Output
    history: History

    @property
    def export(self) -> str:
        """Folder of the finished model, where the output is: local or s3://."""
        return storage.join(self.output.place, self.output.export.name)

    @property
    def export_dir(self) -> Path:
        """That folder on this machine; of an output in S3, for as long as this object."""
        return self.output.export

    @property
    def run_id(self) -> str | None:
        """Of MLflow; None while that was never reached."""
        return self.output.run.run_id

    @property
    def store(self) -> TrackingStore:
        """Of MLflow."""
        return self.output.store

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """One per step, from the first; read from the file, and not small for a long run."""
        return tuple(self.history.read())

    @property
    def steps(self) -> int:
        """Updates made."""
        return self.history.last_step

    @property
    def metrics(self) -> dict[str, float]:
        """First and last loss, and the median throughput of the second half of the steps."""
        first = next(self.history.read())
        last, rates = first, []
        for last in self.history.read(after=self.steps // 2):
            rates.append(last.tokens_per_s)
        return {"loss_first": first.loss, "loss_last": last.loss, "tokens_per_s": sorted(rates)[len(rates) // 2]}


def train(config: TrainConfig) -> TrainResult:
    """Train, or continue what an interrupted call with the same config left in ``config.output``.

    Raises:
        UserError: for anything wrong that can be known before the work begins.
        JobError: if training fails, or a disk or store; what is in the output is kept, and the same call continues.
    """
    with storage_errors_as(JobError, "what was done is kept: give the same command again to continue"):
        return _train(config)


def _train(config: TrainConfig) -> TrainResult:
    prepared = prepare(config)
    config = prepared.config
    output = Output(config, snapshot_digest=prepared.dataset_digest, fork=describe_fork)
    if output.store.in_output:
        where = f"{output.folder} began with an MLflow store of its own and goes on in it"
        tqdm.write(f"{where}: {output.store.how_to_open}", file=sys.stderr)
    if config.fork_from is not None and not output.begun:
        find_beginning(
            prepared, output
        )  # refuses a parent that does not fit before there is a folder with a lock in it
    with joining(places(config, output), config.cluster):
        if not output.begun:
            check_cluster(config)  # of what can be known before Ray starts; likewise
        with held(output):
            return _continue(prepared, output)


def places(config: TrainConfig, output: Output) -> dict[str, str | None]:
    """What the machines of a cluster share of a run, by the keys that name it."""
    sources = {f"data.sources.{number}.dataset": each.dataset for number, each in enumerate(config.data.sources)}
    return {
        "output": output.place,
        "checkpoint.storage": config.checkpoint.storage,
        "data.dataset": config.data.dataset,
        **sources,
        "init_from": config.init_from,
        "fork_from": config.fork_from,
        "data.tokenizer.path": config.data.tokenizer.path if config.data.tokenizer else None,
        "deepspeed": config.deepspeed if config.deepspeed.endswith(".json") else None,
        "samples.clip.weights": config.samples.clip.weights if config.samples.clip else None,
    }


def _continue(prepared: PreparedRun, output: Output) -> TrainResult:
    config = prepared.config
    beginning = find_beginning(prepared, output)
    if beginning.step < config.steps or not beginning.kept:
        check_cluster(config)  # of what can be known before Ray starts
    output.begin(config)
    history = History(output.metrics_file)
    take_over_record(beginning, output, history)
    sender = Sender(prepared=prepared, output=output, history=history, kept=lambda: _kept_checkpoints(output))
    try:
        if beginning.kept and beginning.step >= config.steps:
            last = beginning.kept[0]
            sampling = recommend(prepared, output, last)
        else:
            with sender, connect():  # opening MLflow takes seconds, and so does joining Ray
                check_cluster(config)
                sender.check(_OPENING_SECONDS)
                if beginning.kept:  # of which the first was found good just now
                    prune(output.storage, beginning.kept[: config.checkpoint.keep])
                _fit(prepared, output, history, beginning=beginning, sender=sender)
                last, *older = find_checkpoints(output.storage)
                output.check_held()  # what another run is writing looks incomplete
                prune(output.storage, [last, *older][: config.checkpoint.keep])  # it was read back when it was written
                sampling = recommend(prepared, output, last)
        return _finish(output, history, sender, last=last, config=config, sampling=sampling)
    except BaseException as error:
        sender.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        _push_what_is_left(output)
        if isinstance(error, KeyboardInterrupt):
            tqdm.write(f"stopped at once (SIGTERM saves a checkpoint first): {_kept(output, history)}", file=sys.stderr)
        raise


def _push_what_is_left(output: Output) -> None:
    """After a failure, which is what a person is to be told; another run may have the output by now."""
    try:
        output.push()
    except (OSError, UserError, JobError) as error:
        tqdm.write(f"warning: {output.place} lacks the newest of what was recorded: {error}", file=sys.stderr)


def _checkpoint_of(output: Output, step: int) -> StoredCheckpoint | None:
    return next((stored for stored in find_checkpoints(output.storage) if stored.state.step == step), None)


def _kept_checkpoints(output: Output) -> dict[int, str]:
    # Of two of one step, the later attempt's: the other was damaged.
    return {stored.state.step: stored.uri for stored in reversed(find_checkpoints(output.storage))}


def _fit(prepared: PreparedRun, output: Output, history: History, *, beginning: Beginning, sender: Sender) -> None:
    """Run the workers to the last checkpoint, following them."""
    config, records, orders = prepared.config, open_queue(), open_queue()
    output.update(finished=False)  # of a run that is made longer
    progress = Progress(config.steps, done=history.last_step, enabled=config.progress)
    if beginning.checkpoint is not None:
        step, last = beginning.step, history.last_step
        again = f"; steps up to {last}, which are recorded, are computed once more" if last > step else ""
        progress.say(f"continuing from the checkpoint of step {step}{again}")
    elif history.last_step:
        last = history.last_step
        progress.say(f"{output.storage} has no checkpoint: from step 1; steps up to {last} are recorded and not again")
    lacking = (validate.describe(prepared), sampling_choice.describe(prepared), slow_precision(config))
    for lacks in filter(None, lacking):
        progress.say(lacks)
    job = make_job(prepared, output, records=records, orders=orders, beginning=beginning)

    def show(record: StepRecord) -> None:
        fence.check()
        if record.skipped:
            progress.say(_skipped(record, prepared))
        progress.show(record)

    sampler = Sampler(prepared, output.samples, say=progress.say)
    fatal: list[str] = []  # errors of workers that would come again

    waiting = Waiting(partial(held_by_others, processes_of(config)), progress.say)

    def hear(said: dict[str, Any]) -> None:
        waiting.over()
        if said["event"] == "fatal":
            where = "start" if said["step"] is None else f"step {said['step']}"
            fatal.append(f"rank {said['rank']}, {where}: {said['cause']}")
            stop()
        else:
            fence.check(lambda: _hear(said, output, sender, sampler, progress))

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)  # what ends Ray Train's fit()

    fence = Fence(output, stop)
    recorder = Recorder(queue=records, history=history, on_record=show, on_event=hear, on_failure=stop)
    failure: BaseException | None = None
    result: Any = None  # its static type in Ray is that of Train V1
    try:
        with progress, recorder, waiting, interruptible(), saved_on_sigterm(orders, progress, lambda: waiting.is_over):
            result = fit_with_patience(job, prepared, output, progress)
    except (KeyboardInterrupt, ray.train.TrainingFailedError) as error:
        failure = error
    sampler.close(finished=failure is None)
    fence.close(failure)
    kept = _kept(output, history)
    _check_failure(failure, recorder.failure, fatal, kept)
    _check_end(result.return_value, config, output, kept)


@dataclass
class Fence:
    """Ends a training whose output another run took over: it would go on, and only what it writes would be refused."""

    output: Output
    stop: Callable[[], None]
    error: JobError | None = None  # that ended it

    def check(self, action: Callable[[], None] | None = None) -> None:
        """Unless it has ended: see whether the output is known to be lost, and do something that may find it so."""
        if self.error is not None:
            return
        try:
            if self.output.is_taken:
                self.output.check_held()
            if action is not None:
                action()
        except JobError as error:
            self.error = error
            self.stop()

    def close(self, failure: BaseException | None) -> None:
        """Raise what ended the training, if it was this."""
        if self.error is not None:
            raise self.error from failure


def _check_failure(
    failure: BaseException | None, of_record: BaseException | None, fatal: Sequence[str], kept: str
) -> None:
    """Raise what a person is to be told where training failed or was interrupted."""
    if fatal:
        raise JobError(
            f"training failed at {fatal[0]}. It is not tried again, for it would fail again. {kept}"
        ) from failure
    if of_record is not None:
        raise JobError(
            f"the record of the steps could not be kept ({type(of_record).__name__}: {of_record}), so training was "
            f"stopped at once. {kept}"
        ) from of_record
    if isinstance(failure, ray.train.TrainingFailedError):
        raise JobError(f"training failed: {reason_of(failure)}. {kept}") from failure
    if failure is not None:
        raise failure


def _check_end(ended: Any, config: TrainConfig, output: Output, kept: str) -> None:
    """Raise a JobError where the workers ended before the last step."""
    if isinstance(ended, Stopped):
        saved = "its checkpoint is saved" if ended.saved else "its checkpoint could not be saved"
        raise JobError(f"stopped by SIGTERM at step {ended.step}; {saved}. {kept}")
    if ended:
        raise JobError(
            f"training stopped after {config.max_skipped_in_a_row + 1} steps in a row whose loss or gradients were not "
            f"finite, at {ended}. The weights are those before them. Fork from a checkpoint before they began, with a "
            "lower optimizer.lr, a longer warm-up or a lower clip_norm: output=ANOTHER "
            f"fork_from={output.place}@STEP; or raise max_skipped_in_a_row. {kept}"
        )


def _hear(said: dict[str, Any], output: Output, sender: Sender, sampler: Sampler, progress: Progress) -> None:
    """What a worker says beside the record."""
    kind = said.pop("event")
    if kind == "start":
        output.started(**said)
    elif kind == "checkpoint":
        sender.checkpointed()
        if sampler.due(said["step"]):
            sampler.offer(said["step"], lambda step: _checkpoint_of(output, step))
        output.push()  # last, as the store of the output may fail
    elif kind == "warning":
        progress.say(f"warning: {said['message']}")
    elif kind == "phases":
        keep_phases(output.folder, said)
    elif kind == "hang":
        file = keep_stacks(output.folder, said)
        output.push()
        progress.say(
            f"rank {said['rank']} is in step {said['step']} for {said['seconds']:g} s; its stacks are in {file}"
        )


def _skipped(record: StepRecord, prepared: PreparedRun) -> str:
    """For a person: a step that made no update, and what it was made of."""
    snapshot, clips = clips_of_step(prepared, record.step - 1)
    figures = f"loss {record.loss}, gradient norm {record.grad_norm}"
    return f"step {record.step} skipped: {figures}; its clips of {snapshot}: {', '.join(clips)}"


def _kept(output: Output, history: History) -> str:
    try:
        found = find_checkpoints(output.storage)
        place = f"continues from the checkpoint of step {found[0].state.step}" if found else "begins again from step 1"
    except (OSError, UserError):  # it may be why training failed
        place = "continues from the last checkpoint"
    return f"{history.last_step} steps are in {output.place}; the same command {place}"


def _finish(
    output: Output,
    history: History,
    sender: Sender,
    *,
    last: StoredCheckpoint,
    config: TrainConfig,
    sampling: SamplingConfig | None,
) -> TrainResult:
    """Bring the finished model out of the last checkpoint and close the run."""
    make = partial(export, last, dtype=config.export_dtype, scratch=config.checkpoint.scratch, sampling=sampling)
    make(output.export)
    if not last.state.exported and has_ema(last):
        make(output.folder / EMA_EXPORT, ema=True)
    output.push()
    sender.end("FINISHED", output.export)
    return TrainResult(output, history)
