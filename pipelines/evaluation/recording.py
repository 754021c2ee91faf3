"""Results on the MLflow run of the training that made the model."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines import storage
from pipelines.errors import JobError, UserError
from pipelines.evaluation.compare.runs import RunStore
from pipelines.evaluation.evaluate import RunScores
from pipelines.evaluation.videos import VideoFolder

NONE = "none"  # as a run: record nowhere
_ARTIFACTS = "evaluation"
_MAX_ARTIFACT = 100e6  # bytes of a file that is copied; a gallery may hold more


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Where results are recorded."""

    runs: tuple[str, ...] = ()  # MLflow runs of the folders, in order; empty: those that the folders' notes lead to
    tracking_uri: str | None = None
    step: int | None = None  # of the checkpoint; None: a run's last


class Recorder:
    """Writes on one run of a store.

    Raises:
        UserError: if there is no such run.
    """

    def __init__(self, run: str, config: RecordConfig) -> None:
        self._store, self._step = RunStore(config.tracking_uri), config.step
        self._uri, self.run_id = self._store.locate(run)

    def record(self, values: Mapping[str, float], files: Sequence[str], *, label: str) -> str:
        """Record figures, and copy files (local or s3://) to the artifacts; returns what was done, in words.

        Raises:
            JobError: if the store does not take them.
        """
        from mlflow.exceptions import MlflowException

        try:
            with tempfile.TemporaryDirectory(prefix="lumos-evaluation-") as scratch:
                folder = Path(scratch) / _ARTIFACTS / label
                folder.mkdir(parents=True)
                for uri in files:
                    data = storage.read_bytes(uri)
                    if len(data) <= _MAX_ARTIFACT:
                        (folder / uri.rstrip("/").rpartition("/")[2]).write_bytes(data)
                step = self._store.record(self._uri, self.run_id, values, step=self._step, files=Path(scratch))
        except (MlflowException, OSError) as error:
            raise JobError(f"results are not on run {self.run_id} of {self._uri} ({error}): try again") from error
        return f"recorded on run {self.run_id} at step {step}, store {self._uri}"


def run_values(run: RunScores) -> dict[str, float]:
    """Figures of a folder by their names in MLflow, each with the ends of its interval."""
    values = {}
    for name, figure in run.figures.items():
        values[f"eval/{name}"] = figure.value
        if figure.interval95 is not None:
            values[f"eval/{name}_low"], values[f"eval/{name}_high"] = figure.interval95
    return values


def training_of(folder: VideoFolder) -> str | None:
    """The output folder of the training that made the model of some videos, as far as notes tell and it is here."""
    model = (folder.note.get("config") or {}).get("model")
    if not isinstance(model, str):
        return None
    candidates = [model.rstrip("/").rpartition("/")[0]]
    config = storage.join(model, "config.json")
    try:
        exported = storage.read_json(config)["lumos"]["info"]["train_config"]["output"]
        candidates.append(str(exported))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        pass  # a released checkpoint, or one that is not here
    return next((each for each in candidates if each and storage.exists(storage.join(each, "run.json"))), None)


def recorders(folders: Sequence[VideoFolder], config: RecordConfig) -> tuple[list[Recorder | None], list[str]]:
    """One for each folder, or none where its run is not known; and why not, in words.

    Raises:
        UserError: if a run that was named cannot be found, or not every folder has one.
    """
    runs = config.runs
    if runs and list(runs) == [NONE]:  # of all
        return [None] * len(folders), []
    if runs and len(runs) != len(folders):
        raise UserError(f"--run names {len(runs)} runs for {len(folders)} folders: one for each, in order, or none")
    if runs:
        return [None if run == NONE else Recorder(run, config) for run in runs], []
    found: list[Recorder | None] = []
    words = []
    for folder in folders:
        output = training_of(folder)
        try:
            found.append(None if output is None else Recorder(output, config))
        except UserError as error:
            found.append(None)
            words.append(f"not recorded in MLflow: {error}")
    ids = [each.run_id for each in found if each is not None]
    if len(set(ids)) < len(ids):
        words.append(
            "not recorded in MLflow: several folders are of one run, which shows one value of each figure; "
            f"give --run for each, {NONE} for those to leave out"
        )
        return [None] * len(found), words
    return found, words
