"""Finding training runs in MLflow by whatever names them, and reading what they recorded."""

import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines import storage
from pipelines.errors import UserError
from pipelines.storage import s3
from pipelines.tracking import TrackingStore

logger = logging.getLogger(__name__)

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_CURVES = re.compile(r"loss|loss_frame_\d+|step_seconds|tokens_per_s(_per_device)?|tokens_seen|val/loss")
_MAX_NAMES = 8  # listed in a message
# Videos drawn beside a training are artifacts in SAMPLES/step-XXXXXXXX, with a file that says what they were drawn of.
SAMPLES, SAMPLES_FILE = "samples", "samples.json"

Curve = Mapping[int, float]  # step -> value


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as MLflow has it."""

    run_id: str
    uri: str  # of its store
    name: str
    experiment: str
    status: str
    params: Mapping[str, str]  # the flattened config
    tags: Mapping[str, str]
    last: Mapping[str, float]  # last value of every metric
    curves: Mapping[str, Curve]

    @property
    def steps(self) -> int:
        """The last step recorded."""
        return max(self.curves["loss"], default=0)


class RunStore:
    """Runs in one or several MLflow stores.

    Args:
        tracking_uri: of the store; None: that of each output folder, and for names ``mlruns.db`` here or one folder
            below, where training keeps it.
    """

    def __init__(self, tracking_uri: str | None) -> None:
        self.tracking_uri = tracking_uri
        self._clients: dict[str, Any] = {}

    def find(self, names: Sequence[str]) -> list[Run]:
        """The runs that names stand for (output folders, experiments, run ids, run names), each once, in order.

        Raises:
            UserError: if a name stands for nothing, or a run has recorded no loss.
        """
        found: dict[str, Run] = {}
        for name in names:
            for uri, run_id in self._resolve(name):
                if run_id not in found:
                    found[run_id] = self._read(uri, run_id)
        runs = [run for run in found.values() if run.curves["loss"]]
        empty = ", ".join(run.name for run in found.values() if not run.curves["loss"])
        if not runs:
            raise UserError(f"no step is recorded of {empty}: wait until they have trained, or name others")
        if empty:
            logger.warning("left out, since no step is recorded of them: %s", empty)
        return runs

    def locate(self, name: str) -> tuple[str, str]:
        """Store and id of the one run of a name.

        Raises:
            UserError: if it stands for none, or for several.
        """
        found = list(dict.fromkeys(self._resolve(name)))
        if len(found) > 1:
            raise UserError(f"{name!r} stands for {len(found)} runs: name one by its id, its name or its output folder")
        uri, run_id = found[0]
        if self._get(self._client(uri), run_id) is None:
            raise UserError(f"{uri} has no run {run_id}: name the store that has it by --tracking-uri")
        return uri, run_id

    def record(self, uri: str, run_id: str, values: Mapping[str, float], *, step: int | None, files: Path) -> int:
        """Record figures on a run, and copy a folder to its artifacts; returns their step.

        Args:
            uri: of the store.
            run_id: of the run.
            values: by name.
            step: of the checkpoint that they are of; None: the run's last.
            files: folder whose files and folders become artifacts.
        """
        from mlflow.entities import Metric

        client = self._client(uri)
        if step is None:
            step = max((point.step for point in client.get_metric_history(run_id, "loss")), default=0)
        now = round(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])
        client.log_artifacts(run_id, str(files))
        return step

    def newest_samples(self, run: Run, folder: Path) -> tuple[int, dict[str, Path]]:
        """The newest videos drawn beside a run, copied into a folder: their step, and each by its prompt."""
        client, folder = self._client(run.uri), folder / run.run_id
        folder.mkdir()
        for path in sorted((each.path for each in client.list_artifacts(run.run_id, SAMPLES)), reverse=True):
            copied = Path(client.download_artifacts(run.run_id, path, str(folder)))
            if (copied / SAMPLES_FILE).is_file():  # else it is still being sent
                said = json.loads((copied / SAMPLES_FILE).read_text(encoding="utf-8"))
                return said["step"], {
                    prompt: copied / name for prompt, name in zip(said["prompts"], said["files"], strict=True)
                }
        return 0, {}

    def _resolve(self, name: str) -> Iterator[tuple[str, str]]:
        """Stores and ids of the runs of a name."""
        output = str(Path(name).expanduser()) if storage.is_local(name) else name
        s3.check_store(output)
        if storage.exists(storage.join(output, "run.json")):
            yield self._of_output(output)
            return
        if s3.is_s3(name) or (name.startswith(("/", ".", "~")) and self.tracking_uri is None):
            raise UserError(f"{name} is no output folder of a training: it has no run.json")
        uri = self._default_uri()
        client = self._client(uri)
        if _RUN_ID.fullmatch(name) and self._get(client, name):
            yield uri, name
            return
        experiment = client.get_experiment_by_name(name)
        homes = [experiment] if experiment else client.search_experiments()
        quote = '"' if "'" in name else "'"  # MLflow knows no way to write one within the other
        everything = bool(experiment) or quote in name
        query = "" if everything else f"attributes.run_name = {quote}{name}{quote}"
        runs: list[Any] = []
        for home in homes:
            runs += client.search_runs([home.experiment_id], query, order_by=["attributes.start_time ASC"])
        runs = [run for run in runs if experiment or run.info.run_name == name]
        if experiment and not runs:
            raise UserError(f"the experiment {name!r} of {uri} has no runs: wait until one has begun, or name another")
        if not runs:
            known = [home.name for home in client.search_experiments() if home.name != "Default"]
            raise UserError(
                f"{name!r} is no experiment, run id, run name or output folder of a training; {uri} has the "
                f"experiments {', '.join(known[:_MAX_NAMES]) or 'none'}. Name one of these, or another store by "
                "--tracking-uri"
            )
        for run in runs:
            yield uri, run.info.run_id

    def _of_output(self, folder: str) -> tuple[str, str]:
        run_file, config_file = (storage.join(folder, name) for name in ("run.json", "config.yaml"))
        try:
            run_id = storage.read_json(run_file).get("run_id")
            config = yaml.safe_load(storage.read_bytes(config_file)) if storage.exists(config_file) else {}
            uri = (config.get("tracking") or {}).get("uri")
        except (AttributeError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{folder}: run.json or config.yaml cannot be read ({error}): name the run by its id"
            ) from error
        if run_id is None:
            raise UserError(
                f"{folder} is the output of a run that MLflow does not have yet: begin it with `lumos train`"
            )
        return TrackingStore.choose(self.tracking_uri or uri, Path(folder)).uri, run_id

    def _default_uri(self) -> str:
        if self.tracking_uri is not None:
            return self.tracking_uri
        here = Path.cwd()
        files = sorted([*here.glob("mlruns.db"), *here.glob("*/mlruns.db")])
        if len(files) != 1:
            which = f"several ({', '.join(str(file) for file in files[:_MAX_NAMES])})" if files else "none"
            raise UserError(
                f"looked for the MLflow store mlruns.db in {here} and the folders in it and found {which}: name it by "
                "--tracking-uri sqlite:///PATH/mlruns.db, or name output folders of runs"
            )
        return f"sqlite:///{files[0]}"

    def _client(self, uri: str) -> Any:
        if uri not in self._clients:
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient

            file = Path(uri.removeprefix("sqlite:///"))
            if uri.startswith("sqlite:///") and not file.is_file():  # MLflow would make an empty one
                raise UserError(
                    f"--tracking-uri {uri}: there is no such file; training writes mlruns.db beside outputs"
                )
            try:
                with TrackingStore(uri).opening():
                    client = MlflowClient(uri)
                    client.search_experiments(max_results=1)
            except (MlflowException, OSError) as error:
                raise UserError(f"--tracking-uri {uri} cannot be opened ({error}): check the address") from error
            self._clients[uri] = client
        return self._clients[uri]

    @staticmethod
    def _get(client: Any, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return client.get_run(run_id)
        except MlflowException:
            return None

    def _read(self, uri: str, run_id: str) -> Run:
        client = self._client(uri)
        run = self._get(client, run_id)
        if run is None:
            raise UserError(f"{uri} has no run {run_id}: name the store that has it by --tracking-uri")
        curves: dict[str, Curve] = {"loss": {}}
        for key in run.data.metrics:
            if _CURVES.fullmatch(key):
                history = client.get_metric_history(run_id, key)
                curves[key] = dict(sorted((p.step, p.value) for p in history if math.isfinite(p.value)))
        return Run(
            run_id=run_id,
            uri=uri,
            name=run.info.run_name or run_id[:8],
            experiment=client.get_experiment(run.info.experiment_id).name,
            status=run.info.status,
            params=dict(run.data.params),
            tags={key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
            last={key: value for key, value in run.data.metrics.items() if math.isfinite(value)},
            curves=curves,
        )
