"""The output folder of a run: what is in it, and whether a run may continue there."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipelines import storage
from pipelines.config import config_hash, config_to_yaml, provenance
from pipelines.data.snapshot.read import MANIFEST, SNAPSHOTS, list_snapshots
from pipelines.errors import UserError
from pipelines.storage import s3
from pipelines.tracking import TrackingStore, flatten
from pipelines.training.config import ADDED, DataConfig, TrainConfig, without_operational

_SHOWN_DIFFERENCES = 6


@dataclass(frozen=True)
class RunFile:
    """``run.json``: what identifies the run in this folder."""

    key: str  # found again in MLflow by this tag, even if the driver died before it wrote the run's id down
    identity: dict[str, Any]  # of the config: what is computed
    snapshot_digest: str
    provenance: dict[str, Any]
    run_id: str | None = None  # of MLflow
    sent: int = 0  # steps that MLflow has
    finished: bool = False  # and MLflow has the whole of it
    storage: str = ""  # of its checkpoints
    fork: dict[str, str] | None = None  # from: as asked for; digest: of what it is; run_id: of MLflow, of the parent
    samples_sent: int = 0  # step of the last set of samples that MLflow has
    starts: list[dict[str, Any]] = field(default_factory=list)  # of workers: step, time, device, workers


class Output:
    """Paths of an output folder and its run file.

    Raises:
        UserError: if the folder holds a run of another config or snapshot, or something that is no run.
    """

    def __init__(
        self, config: TrainConfig, *, snapshot_digest: str, fork: Callable[[str], dict[str, str]] | None = None
    ) -> None:
        """``fork`` tells of what ``config.fork_from`` names, if the run does not know it yet."""
        if "://" in config.output:
            raise UserError(
                f"output = {config.output!r} is not a local folder: name one, and set checkpoint.storage to an s3:// "
                "URI if checkpoints are to go there"
            )
        self.folder = Path(config.output).expanduser().resolve()
        self.config_file = self.folder / "config.yaml"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.export = self.folder / "export"
        self.samples = self.folder / "samples"
        self._file = self.folder / "run.json"
        self.identity = config.identity()  # what is computed
        found = self._read()
        self.fork = found.fork if found else None
        if config.fork_from is not None:
            if self.fork is None or self.fork["from"] != config.fork_from:
                self.fork = fork(config.fork_from) if fork else None
            self.identity["fork_from"] = (self.fork or {}).get("digest")  # wherever it is kept
        self.storage = self._storage(config, snapshot_digest) or str(self.folder / "checkpoints")
        self.profile = f"{self.storage}/profile" if config.checkpoint.storage else str(self.folder / "profile")
        self.store = TrackingStore.choose(config.tracking.uri, self.folder)
        self.run = self._open(config, snapshot_digest, found)
        self._lock = threading.Lock()

    def begin(self, config: TrainConfig) -> None:
        """Make the folder and write down what will run in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.update()  # first: a folder with anything but this file is not taken for ours
        self.config_file.write_text(config_to_yaml(config))

    def update(self, **changes: Any) -> None:
        """Change the run file."""
        with self._lock:
            self.run = replace(self.run, **changes)
            storage.write_json_atomic(str(self._file), asdict(self.run))

    def started(self, **start: Any) -> None:
        """Write down that the workers began, or began again after a failure."""
        self.update(starts=[*self.run.starts, start])

    @property
    def identity_hash(self) -> str:
        """16 hex digits that name what is computed."""
        return config_hash(self.identity)

    def _read(self) -> RunFile | None:
        if not self._file.exists():
            return None
        try:
            raw = json.loads(self._file.read_text())
            unknown = sorted(raw.keys() - {each.name for each in fields(RunFile)})
            if unknown:
                raise UserError(
                    f"{self._file} was written by a newer lumos (it has {', '.join(unknown)}): install the lumos-ray "
                    f"that wrote it ({raw.get('provenance', {}).get('lumos')}), or name another output"
                )
            return RunFile(**raw)
        except (AttributeError, ValueError, TypeError) as error:
            raise UserError(f"{self._file} cannot be read ({error}): name another output") from error

    def _open(self, config: TrainConfig, snapshot_digest: str, found: RunFile | None) -> RunFile:
        if found is None:
            # A name with a dot is the lock, or what a kill left of an atomic write.
            if self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise UserError(
                    f"output = {self.folder} is not empty and holds no training run: name another folder, or empty it"
                )
            return RunFile(
                key=uuid4().hex,
                identity=self.identity,
                snapshot_digest=snapshot_digest,
                provenance=provenance(),
                storage=self.storage,
                fork=self.fork,
            )
        differences = _differences(without_operational(found.identity), self.identity)
        if found.snapshot_digest != snapshot_digest:
            differences.append(_other_snapshot(config.data, found.snapshot_digest))
        if differences:
            raise UserError(
                f"output = {self.folder} holds another run ({'; '.join(differences[:_SHOWN_DIFFERENCES])}): "
                "name another output, or ask for the same run to continue it"
            )
        return replace(found, storage=self.storage)

    def _storage(self, config: TrainConfig, snapshot_digest: str) -> str | None:
        """Where checkpoints go, if not to the output folder: below what the config names, a folder for this run alone.

        Its name stands for what is computed, so the same run from another output finds its checkpoints there.

        Raises:
            UserError: if it is of no kind that is known, or cannot be reached.
        """
        root = config.checkpoint.storage
        if root is None:
            return None
        if "://" not in root:
            root = str(Path(root).expanduser().resolve())
        try:
            storage.filesystem(root)
            s3.check_store(root)
        except UserError as error:
            raise UserError(
                f"checkpoint.storage = {root} cannot be used ({error}): name a folder or an s3:// URI"
            ) from error
        here, older = (
            f"{root.rstrip('/')}/lumos-{config_hash([identity, snapshot_digest])}"
            for identity in (self.identity, config.older_identity())
        )
        return older if config.fork_from is None and storage.is_dir(older) and not storage.is_dir(here) else here


def _other_snapshot(data: DataConfig, digest: str) -> str:
    """That a run was on another snapshot of a dataset, and how to name that one, if it is there."""
    dataset = data.dataset
    if dataset is None:
        return "snapshots: it is on others of data.sources, or on these in another order; name each by its snapshot"
    for name in list_snapshots(dataset):
        uri = storage.join(dataset, SNAPSHOTS, name)
        if storage.sha256_file(storage.join(uri, MANIFEST)) == digest:
            return f"snapshot: it is on {name}, which data.dataset={uri} names"
    return f"snapshot: it is on one with the digest {digest[:16]}, which {dataset} does not have"


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    left, right = (flatten(ADDED) | flatten(one) for one in (there, asked))  # without a key: as before there was one
    keys = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
    return [f"{key}: {left.get(key)} there, {right.get(key)} asked for" for key in keys]
