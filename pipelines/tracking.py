"""MLflow in one place. Only the driver of a job writes; workers hand it their figures.

Metrics carry the time at which they were measured, so sending one twice changes nothing: MLflow keys a metric by run,
name, step, time and value.
"""

import logging
import os
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from pipelines.errors import UserError

# Read when MLflow is imported, which happens in functions here: its import takes seconds.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one bar for every small file
# A job tries again by itself; by MLflow's own defaults a call to a server that is away takes many minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

logger = logging.getLogger(__name__)

_KEY_TAG = "lumos.key"
_MAX_METRICS = 1000  # of one request
_MAX_PARAMS = 100
_MAX_VALUE = 6000  # characters of a parameter
_CHANGED = "changed."  # begins the tag of a parameter that is another now than when the run began
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")  # of a store, before any "+driver"
_KNOCK_SECONDS = 5.0  # until a server takes a connection
_LOCK_SECONDS = 300.0  # to wait for others that open the same file; making its tables takes seconds


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0]


def check_uri(uri: str) -> None:
    """Raise a ``ValueError`` if an address is of a kind in which MLflow keeps no runs; nothing is opened for it."""
    if _scheme(uri) not in _SCHEMES:
        raise ValueError(
            f"uri = {uri} is none in which MLflow keeps runs: name a server (http://HOST:PORT) or a database "
            "(sqlite:///PATH)"
        )


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

    def silence(self) -> str:
        """For a person: that nobody listens where a server should; empty where one does, or none is meant."""
        address = urlsplit(self.uri)
        if address.scheme not in ("http", "https"):
            return ""
        try:
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout=_KNOCK_SECONDS).close()
        except (OSError, ValueError) as error:
            return f"tracking.uri = {self.uri}: MLflow does not answer there ({error})"
        return ""

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


@dataclass(frozen=True)
class ModelLink:
    """A model that is kept somewhere else than in MLflow."""

    step: int
    uri: str
    measured: Sequence[MetricRow]  # its metrics, each at the step at which it was measured

    @property
    def values(self) -> dict[str, float]:
        """Its metrics by name."""
        return {name: value for row in self.measured for name, value in row.values.items()}


class TrackingUnavailableError(Exception):
    """The store cannot be reached now; it may be later."""


class Tracker:
    """One MLflow run: made once, then resumed.

    Raises:
        UserError: if there cannot be a store of that address, or it turns us away.
        TrackingUnavailableError: if it cannot be reached.
    """

    def __init__(self, store: TrackingStore, *, experiment: str, key: str, run_name: str | None) -> None:
        """Open the store, and make the run, or resume that of the key.

        The key identifies it among those of the experiment, whether or not its id was written down in time.
        """
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow.exceptions import MlflowException, RestException
        from mlflow.tracking import MlflowClient

        scheme = _scheme(store.uri)
        failed = f"tracking.uri = {store.uri}: cannot open experiment {experiment!r}"
        try:
            with store.opening():
                self._client = MlflowClient(store.uri)
                found = self._client.get_experiment_by_name(experiment)
                self._home = (
                    found.experiment_id if found else self._client.create_experiment(experiment, store.artifacts)
                )
            runs = self._client.search_runs([self._home], f"tags.`{_KEY_TAG}` = '{key}'")
            self.resumed = bool(runs)
            run = runs[0] if runs else self._client.create_run(self._home, run_name=run_name, tags={_KEY_TAG: key})
            self.run_id: str = run.info.run_id
            if self.resumed:
                self._client.update_run(self.run_id, status="RUNNING")
        except (MlflowException, OSError) as error:
            turned_away = isinstance(error, RestException) and 400 <= int(error.get_http_status_code()) < 500  # type: ignore[no-untyped-call]
            busy = isinstance(error, TimeoutError) or "locked" in str(error)  # by another process, of a file
            if turned_away or (scheme == "sqlite" and not busy):
                raise UserError(f"{failed} ({error}); check the address of the store, or name another") from error
            raise TrackingUnavailableError(f"{failed} ({error})") from error
        self.uri = store.uri

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters, nested keys joined by dots.

        MLflow lets no parameter change: one that has, such as a key of how a run is carried out, keeps its first value,
        and the tag ``changed.KEY`` has what it is now.
        """
        from mlflow.entities import Param

        flat = {key: str(value)[:_MAX_VALUE] for key, value in flatten(params).items()}
        data = self._client.get_run(self.run_id).data
        new = [Param(key, value) for key, value in flat.items() if key not in data.params]
        for first in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(self.run_id, params=new[first : first + _MAX_PARAMS])
        for key, value in flat.items():
            tag, changed = f"{_CHANGED}{key}", data.params.get(key, value) != value
            if changed and data.tags.get(tag) != value:
                self._client.set_tag(self.run_id, tag, value)
            elif not changed and tag in data.tags:
                self._client.delete_tag(self.run_id, tag)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags, replacing older values."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

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

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a folder with what is in it, to the run's artifacts under its own name."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def log_image(self, pixels: NDArray[np.uint8], *, key: str, step: int, time: float) -> None:
        """Record a picture [H, W, C] of a step; MLflow shows those of one key with a slider over the steps."""
        self._client.log_image(self.run_id, pixels, key=key, step=step, timestamp=round(time * 1000))

    def log_models(self, links: Sequence[ModelLink], *, best_by: str) -> None:
        """Make the run's logged models those that the links name: a link and metrics each, no weights.

        Models whose step is no longer there are taken out. The one with the lowest metric ``best_by`` has the tag
        ``best``, and its name is the run's tag ``best_model``.
        """
        known = {model.name: model for model in self._models()}
        ids = {}
        for link in links:
            model = known.pop(name := f"step-{link.step:08d}", None) or self._make_model(name, link)
            ids[name] = model.model_id
            if model.tags.get("uri") != link.uri:
                self._client.set_logged_model_tags(model.model_id, {"uri": link.uri})
        for model in known.values():
            self._client.delete_logged_model(model.model_id)
        rated = [link for link in links if best_by in link.values]
        if rated:
            best = f"step-{min(rated, key=lambda link: link.values[best_by]).step:08d}"
            for name, model_id in ids.items():
                self._client.set_logged_model_tags(model_id, {"best": str(name == best).lower()})
            self._client.set_tag(self.run_id, "best_model", best)

    def _models(self) -> list[Any]:
        models: list[Any] = []
        token = None
        while True:
            page = self._client.search_logged_models(
                [self._home], filter_string=f"source_run_id = '{self.run_id}'", page_token=token
            )
            models += page
            token = page.token
            if not token:
                return models

    def _make_model(self, name: str, link: ModelLink) -> Any:
        tags = {"step": str(link.step), "uri": link.uri}
        model = self._client.create_logged_model(
            self._home, name=name, source_run_id=self.run_id, tags=tags, model_type="lumos-checkpoint"
        )
        for row in link.measured:
            for key, value in row.values.items():
                self._client.log_metric(
                    self.run_id, key, value, timestamp=round(row.time * 1000), step=row.step, model_id=model.model_id
                )
        self._client.finalize_logged_model(model.model_id, "READY")
        return model

    def monitor_system(self) -> Callable[[], None]:
        """Record use of this machine's processors, memory, disk and network from now on; returns what ends it."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        monitor = SystemMetricsMonitor(self.run_id, resume_logging=self.resumed, tracking_uri=self.uri)  # type: ignore[no-untyped-call]
        monitor.start()  # type: ignore[no-untyped-call]
        return monitor.finish

    def end(self, status: str) -> None:
        """End the run as "FINISHED", "FAILED" or "KILLED"."""
        self._client.set_terminated(self.run_id, status)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
