"""MLflow in one place. Only the driver of a job writes; workers hand it their figures.

Metrics carry the time at which they were measured, so sending one twice changes nothing: MLflow keys a metric by run,
name, step, time and value.
"""

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipelines.errors import UserError

# Read when MLflow is imported, which happens in functions here: its import takes seconds.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

logger = logging.getLogger(__name__)

_KEY_TAG = "lumos.key"
_MAX_METRICS = 1000  # of one request
_MAX_PARAMS = 100
_MAX_VALUE = 6000  # characters of a parameter
_LOCK_SECONDS = 300.0  # to wait for others that open the same file; making its tables takes seconds


@dataclass(frozen=True)
class TrackingStore:
    """Where runs are tracked: a server, a database, or an SQLite file with a folder for artifacts beside it."""

    uri: str
    artifacts: str | None = None  # root of the artifacts of a new experiment; none: the store's own choice
    in_output: bool = False  # of one run alone, as older programs had it

    @classmethod
    def choose(cls, uri: str | None, output: Path) -> "TrackingStore":
        """The store of the run in the folder ``output``: the one named, else that of the folder which holds it.

        So the runs of one working folder stand in one store. A run that an older program began with a store in its
        own output goes on in that.
        """
        if uri is not None:
            return cls(uri)
        folder = output.resolve()
        in_output = (folder / "mlflow.db").exists()
        if in_output:
            file, artifacts = folder / "mlflow.db", folder / "mlflow-artifacts"
        else:
            file, artifacts = folder.parent / "mlruns.db", folder.parent / "mlartifacts"
        return cls(f"sqlite:///{file}", artifacts.as_uri(), in_output)

    @property
    def how_to_open(self) -> str:
        """What shows the runs: a command, or the address of a server."""
        if self.uri.startswith(("http://", "https://")):
            return self.uri
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"

    def opening(self) -> AbstractContextManager[Any]:
        """Within the block no other process makes the tables or experiments of a file: MLflow itself does not look.

        Later writes need no lock: SQLite has its own, for which MLflow waits 20 s.
        """
        if self.uri.startswith("sqlite:///"):
            return FileLock(f"{self.uri.removeprefix('sqlite:///')}.lock", timeout=_LOCK_SECONDS)
        return nullcontext()


@dataclass(frozen=True)
class MetricRow:
    """Metrics of one step."""

    step: int
    time: float  # seconds since the epoch
    values: Mapping[str, float]


class Tracker:
    """One MLflow run: made once, then resumed.

    Raises:
        UserError: if the store cannot be opened.
    """

    def __init__(self, store: TrackingStore, *, experiment: str, key: str, run_name: str | None) -> None:
        """Open the store, and make the run, or resume that of the key.

        The key identifies it among those of the experiment, whether or not its id was written down in time.
        """
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        try:
            with store.opening():
                self._client = MlflowClient(store.uri)
                found = self._client.get_experiment_by_name(experiment)
                home = found.experiment_id if found else self._client.create_experiment(experiment, store.artifacts)
            runs = self._client.search_runs([home], f"tags.`{_KEY_TAG}` = '{key}'")
            self.resumed = bool(runs)
            run = runs[0] if runs else self._client.create_run(home, run_name=run_name, tags={_KEY_TAG: key})
            self.run_id: str = run.info.run_id
            if self.resumed:
                self._client.update_run(self.run_id, status="RUNNING")
        except (MlflowException, OSError) as error:
            raise UserError(
                f"tracking.uri = {store.uri}: cannot open experiment {experiment!r} ({error}); check the address of "
                "the store, or name another"
            ) from error

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters, nested keys joined by dots. Those recorded already must be equal."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:_MAX_VALUE]) for key, value in flatten(params).items()]
        for first in range(0, len(flat), _MAX_PARAMS):
            self._client.log_batch(self.run_id, params=flat[first : first + _MAX_PARAMS])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags, replacing older values."""
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)

    def log_dataset(self, *, name: str, digest: str, source: str, context: str) -> None:
        """Record what was read. ``digest`` is a SHA-256 in hex, of which MLflow keeps 32 digits."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name=name, digest=digest[:32], source_type="lumos-snapshot", source=source)
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_metrics(self, rows: Sequence[MetricRow]) -> None:
        """Record metrics; rows recorded already are left as they are."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), round(row.time * 1000), row.step)
            for row in rows
            for name, value in row.values.items()
        ]
        for first in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + _MAX_METRICS])

    def log_artifact(self, path: Path) -> None:
        """Copy a file, or a folder with what is in it, to the run's artifacts under its own name."""
        self._client.log_artifact(self.run_id, str(path))

    def finish(self) -> None:
        """End the run as finished."""
        self._client.set_terminated(self.run_id, "FINISHED")

    def abandon(self, status: str) -> None:
        """End the run as "FAILED" or "KILLED" if the store can be reached: there is an error to tell about already."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_terminated(self.run_id, status)
        except (MlflowException, OSError) as error:
            logger.warning("MLflow run %s could not be marked as %s: %s", self.run_id, status, error)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
