"""What MLflow gets of a run, sent beside the training: training never waits for it, and never fails by it.

Everything is made of what the output holds (``metrics.jsonl``, ``run.json``, checkpoints, samples), so that whatever
could not be sent, for minutes or until the end, is sent later: by this driver, or by the next command on that output.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av

from pipelines import storage
from pipelines.config import config_to_dict
from pipelines.errors import JobError, UserError
from pipelines.evaluation.compare.runs import SAMPLES_FILE
from pipelines.storage.lock import check_lock
from pipelines.tracking import MetricRow, ModelLink, Tracker
from pipelines.training.accelerators import find_accelerator
from pipelines.training.metrics import MetricStream, RunFacts
from pipelines.training.output import Output
from pipelines.training.prepare import PreparedRun
from pipelines.training.record import History
from pipelines.training.sample import read_samples

logger = logging.getLogger(__name__)

_BATCH = 1000  # records sent at a time
_LONGEST_WAIT = 60.0  # seconds between two tries while the store is away
_WEIGHTS = (".safetensors", ".bin", ".pt")  # files that stay where they are; MLflow gets a link


@dataclass(kw_only=True)
class Sender:
    """Opens the run in MLflow and sends what it lacks, in a thread of its own within a block.

    An outage is told once when it begins and once when it is over.
    """

    prepared: PreparedRun
    output: Output
    history: History
    kept: Callable[[], Mapping[int, str]]  # the checkpoints there are: where each step's is

    def __post_init__(self) -> None:
        config = self.prepared.config
        self.tracker: Tracker | None = None
        self._stream = MetricStream(facts=run_facts(self.prepared), log_every=config.tracking.log_every)
        self._rows: list[MetricRow] = []  # made and not sent yet
        self._read = 0  # the last step they were made of
        self._starts = 0  # sent, of this driver's and those before
        self._models_due = True
        self._away = False
        self._taken = False  # the output, by another run, which tells MLflow from now on
        self._stop_monitor: Callable[[], None] | None = None
        self._refusal: UserError | None = None
        self._tried, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="sender", daemon=True)

    def __enter__(self) -> "Sender":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._stop_monitor is not None:
            self._stop_monitor()

    def check(self, seconds: float) -> None:
        """Wait for the store to be opened, or to prove out of reach.

        Raises:
            UserError: if there cannot be such a store.
        """
        self._tried.wait(seconds)
        if self._refusal is not None:
            raise self._refusal

    def checkpointed(self) -> None:
        """There is a checkpoint more."""
        self._models_due = True

    def end(self, status: str, export: Path | None = None) -> None:
        """After the block: send what is left, mark the run as "FINISHED", "FAILED" or "KILLED", and link its model."""
        if self._refusal is not None:
            return

        def send_all() -> None:
            tracker = self._send(to_the_end=True)
            if export is not None:
                self._send_sampling_choice(tracker)
                for file in sorted(export.iterdir()):
                    if file.is_file() and file.suffix not in _WEIGHTS:
                        tracker.log_artifact(file, export.name)
                place = storage.join(self.output.place, export.name) if self.output.mirror else export.as_uri()
                tracker.set_tags({"export": place})
            tracker.end(status)
            self.output.update(finished=status == "FINISHED")

        self._tried.set()  # what a store is refused for now is told as any other reason
        if not self._attempt(send_all) and not self._taken:
            logger.warning(
                "MLflow lacks what %s holds after step %d: the next `lumos train` of this run sends it",
                self.output.place, self.output.run.sent,
            )  # fmt: skip

    def _follow(self) -> None:
        flush = max(self.prepared.config.tracking.flush_seconds, 0.1)
        wait = 0.0
        while not self._done.wait(wait) and self._refusal is None:
            sent = self._attempt(self._send)
            self._tried.set()
            wait = flush if sent else min(_LONGEST_WAIT, 2 * max(wait, flush))

    def _attempt(self, action: Callable[[], Any]) -> bool:
        try:
            check_lock(self.output.place)
            action()
        except JobError:
            self._taken = True
            return False
        except UserError as error:
            if self.tracker is None and not self._tried.is_set():
                self._refusal = error
                return False
            self._tell_away(error)
        except Exception as error:  # noqa: BLE001 - an unreachable server has many kinds; it is tried again
            self._tell_away(error)
        else:
            if self._away:
                logger.warning("MLflow is reached again, and has the steps up to %d", self.output.run.sent)
            self._away = False
        return not self._away

    def _tell_away(self, error: Exception) -> None:
        if not self._away:
            of_store = isinstance(error, OSError) and str(error.filename).startswith(f"{self.output.place}/")
            logger.warning(
                "%s cannot be reached; training goes on, the record is in %s and is sent later: %s",
                *(("The output", self.output.folder) if of_store else ("MLflow", self.output.place)), error,
            )  # fmt: skip
        self._away = True

    def _send(self, *, to_the_end: bool = False) -> Tracker:
        if self.tracker is None:
            self.tracker = self._open()
        self._send_starts(self.tracker)
        self._send_metrics(self.tracker, to_the_end=to_the_end)
        self._send_samples(self.tracker)
        if self._models_due or to_the_end:
            self._models_due = False
            try:
                self.tracker.log_models(self._links(), best_by="val/loss")
            except BaseException:
                self._models_due = True
                raise
        return self.tracker

    def _open(self) -> Tracker:
        config, output = self.prepared.config, self.output
        tracker = Tracker(
            output.store,
            experiment=config.tracking.experiment,
            key=output.run.key,
            run_name=config.tracking.run_name or output.place.rpartition("/")[2],
        )
        provenance = output.run.provenance
        versions = {"lumos": provenance["lumos"], **provenance["packages"]}
        tracker.log_params(config_to_dict(config) | {"versions": versions})
        fork = output.run.fork
        parent = {"fork_from": fork["from"]} if fork else {}
        if fork and "run_id" in fork:
            parent["mlflow.parentRunId"] = fork["run_id"]  # shown as nested below it
        tracker.set_tags(
            {
                **parent,
                "git_commit": provenance["git_commit"],
                "dataset_digest": self.prepared.dataset_digest,
                "num_parameters": str(self.prepared.model.num_parameters),
                "output": output.place,
            }
        )
        for snapshot in self.prepared.datasets:
            name, digest = snapshot.manifest.snapshot_id, snapshot.digest
            tracker.log_dataset(name=name, digest=digest, source=snapshot.uri, context=config.data.split)
        tracker.log_artifact(output.config_file)
        if not tracker.resumed:
            output.update(sent=0, samples_sent=0, finished=False)  # should another store have had them
        output.update(run_id=tracker.run_id)
        if config.tracking.system_metrics and self._thread.is_alive():
            self._stop_monitor = tracker.monitor_system()
        self._pick_up()
        return tracker

    def _pick_up(self) -> None:
        """Go through the steps that were sent, for the totals."""
        self._read = min(self.output.run.sent, self.history.last_step)
        for record in islice(self.history.read(), self._read):
            self._stream.skip(record)

    def _send_starts(self, tracker: Tracker) -> None:
        """Where the workers run, and each time that they went on after a failure."""
        starts = self.output.run.starts
        if len(starts) == self._starts:
            return
        device, workers = starts[-1]["device"], starts[-1]["workers"]
        precision, peak = self.prepared.config.precision, self.prepared.config.tracking.peak_tflops
        found = find_accelerator(device)
        self._stream.peak_flops = peak * 1e12 if peak else found.flops(precision) if found else None
        tracker.log_params({"device": device, "world_size": workers})
        restarts = [
            MetricRow(start["step"], start["time"], {"restarts": float(number)})
            for number, start in enumerate(starts)
            if number >= max(1, self._starts)
        ]
        tracker.log_metrics(restarts)
        self._starts = len(starts)

    def _send_metrics(self, tracker: Tracker, *, to_the_end: bool) -> None:
        while True:
            before = self._read
            if not self._rows:
                for record in islice(self.history.read(after=self._read), _BATCH):
                    self._rows += self._stream.add(record)
                    self._read = record.step
                if to_the_end and self._read == self.history.last_step:
                    self._rows += self._stream.flush()
            if not self._rows and self._read > before:
                continue  # none of these steps ends a row
            if not self._rows:
                return
            self.output.keep_record()  # else a driver that comes after this one would tell these steps twice
            tracker.log_metrics(self._rows)
            self._rows = []
            self.output.update(sent=self._stream.complete)

    def _send_samples(self, tracker: Tracker) -> None:
        for file in sorted(self.output.samples.glob(f"step-*/{SAMPLES_FILE}")):
            step = int(file.parent.name.removeprefix("step-"))
            if step <= self.output.run.samples_sent:
                continue
            try:
                said, strips = read_samples(file.parent)
            except (OSError, ValueError, KeyError, av.error.FFmpegError) as error:  # it would be as bad the next time
                logger.warning("the samples in %s are left out of MLflow: %s", file.parent, error)
                self.output.update(samples_sent=step)
                continue
            time = said["time"]
            for number, strip in enumerate(strips):
                tracker.log_image(strip, key=f"samples/{number:02d}", step=step, time=time)
            tracker.log_artifact(file.parent, "samples")
            values = {f"samples/{name}": float(value) for name, value in said["metrics"].items()}
            tracker.log_metrics([MetricRow(step, time, values)])
            self.output.update(samples_sent=step)

    def _send_sampling_choice(self, tracker: Tracker) -> None:
        """The ways that were tried at the end; the file was found good just now."""
        file = self.output.sampling_choice
        if self.prepared.config.sampling_choice is None or not file.is_file():
            return
        said = json.loads(file.read_text(encoding="utf-8"))
        tracker.log_artifact(file)
        means = {f"sampling_choice/{number:02d}": way["mean"] for number, way in enumerate(said["ways"])}
        tracker.log_metrics([MetricRow(said["step"], said["time"], means)])
        tracker.set_tags({"recommended_sampling": json.dumps(said["sampling"])})

    def _links(self) -> list[ModelLink]:
        every, each_step = self.prepared.config.validation.every, self.prepared.config.tracking.log_every == 1
        links = []
        for step, uri in sorted(self.kept().items()):
            if step > self.history.last_step:  # kept already, and its record still on the way
                self._models_due = True
                continue
            measured: dict[str, MetricRow] = {}  # the last of each
            for record in islice(self.history.read(after=max(0, step - max(1, every))), max(1, every)):
                if record.step > step:
                    break
                if each_step:  # else the loss of this step is not what the row says
                    measured["loss"] = MetricRow(record.step, record.time, {"loss": record.loss})
                if record.val_loss is not None:
                    measured["val/loss"] = MetricRow(record.step, record.time, {"val/loss": record.val_loss})
            links.append(ModelLink(step, uri, tuple(measured.values())))
        return links


def run_facts(prepared: PreparedRun) -> RunFacts:
    """What the metrics of a run depend on."""
    config = prepared.config
    optimizer = config.optimizer
    return RunFacts(
        model=prepared.model,
        codebook_size=prepared.vocabulary.codebook_size,
        num_rows=prepared.plan().epoch_rows,
        muon_factor=optimizer.muon_lr / optimizer.lr if optimizer.kind == "muon" else None,
        workers=config.num_workers,
    )
