"""The output folder of a run: what is in it, and whether a run may continue there."""

import json
import os
import tempfile
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
from pipelines.storage.lock import check_lock, is_lost
from pipelines.tracking import TrackingStore, flatten
from pipelines.training.config import ADDED, DataConfig, TrainConfig, without_operational
from pipelines.training.mirror import Mirror

RUN_FILE = "run.json"  # in the output of a run, which is told by it
EXPORT, EMA_EXPORT = "export", "export-ema"  # folders in it, of the finished model

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

    It may be in S3: the driver works in a temporary folder then, of which all that matters is carried there.

    Raises:
        UserError: if the folder holds a run of another config or snapshot, or something that is no run.
    """

    def __init__(
        self, config: TrainConfig, *, snapshot_digest: str, fork: Callable[[str], dict[str, str]] | None = None
    ) -> None:
        """``fork`` tells of what ``config.fork_from`` names, if the run does not know it yet."""
        self.mirror = None if storage.is_local(config.output) else _open_mirror(config)
        local = storage.filesystem(os.path.expanduser(config.output))[1] if self.mirror is None else ""
        self.folder = self.mirror.folder if self.mirror else Path(local).resolve()
        self.place = self.mirror.uri if self.mirror else str(self.folder)  # what other machines and people call it
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output = {self.folder} is a file; name a folder")
        self.config_file = self.folder / "config.yaml"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.export = self.folder / EXPORT
        self.samples = self.folder / "samples"
        self.sampling_choice = self.folder / "sampling_choice.json"
        self._file = self.folder / RUN_FILE
        self.identity = config.identity()  # what is computed
        found = self._read()
        self.fork = found.fork if found else None
        if config.fork_from is not None:
            if self.fork is None or self.fork["from"] != config.fork_from:
                self.fork = fork(config.fork_from) if fork else None
            self.identity["fork_from"] = (self.fork or {}).get("digest")  # wherever it is kept
        self.storage = self._storage(config, snapshot_digest) or f"{self.place}/checkpoints"
        self.profile = f"{self.storage if config.checkpoint.storage else self.place}/profile"
        self.store = TrackingStore.choose(config.tracking.uri, self.folder)
        self.run = self._open(config, snapshot_digest, found)
        self._lock = threading.Lock()

    @property
    def begun(self) -> bool:
        """Whether a run began here before."""
        return self._file.exists()

    def check_writable(self) -> None:
        """Refuse folders that cannot be made or written to, as a training that takes them would; leaves nothing there.

        Raises:
            UserError: naming the folder.
        """
        for name, folder in (("output", self.place), ("checkpoint.storage", self.storage)):
            if storage.is_local(folder):
                path = Path(storage.filesystem(folder)[1])
                there = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
                try:  # what a folder's mode says is not what root may do
                    tempfile.TemporaryDirectory(prefix=".lumos-", dir=there).cleanup()
                except OSError as error:
                    raise UserError(
                        f"{name} = {folder} cannot be written to ({error.strerror}); name another folder"
                    ) from error

    def begin(self, config: TrainConfig) -> None:
        """Make the folder and write down what will run in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.update()  # first: a folder with anything but this file is not taken for ours
        self.config_file.write_text(config_to_yaml(config))
        self.push()

    def resume(self) -> None:
        """Once the output is held: bring what another machine's driver left of it, if it is in a store."""
        if self.mirror:
            before = self.run
            self.mirror.pull(samples_after=before.samples_sent)
            self.run = replace(self._read() or before, storage=self.storage)
            if self.run.key != before.key:
                raise UserError(f"output = {self.place} was begun by another run just now: give the command again")

    @property
    def is_taken(self) -> bool:
        """Whether this process knows that another run took over the output, or the storage of its checkpoints."""
        return is_lost(self.place) or is_lost(self.storage)

    def check_held(self) -> None:
        """Before something is deleted: a ``JobError`` if another run took over the output or its checkpoints."""
        check_lock(self.place)
        check_lock(self.storage)

    def keep_record(self) -> None:
        """Before MLflow hears of steps: have their record outlive this machine, if the output is in a store."""
        if self.mirror:
            self.mirror.keep_record()

    def push(self) -> None:
        """Have all that is in the folder outlive this machine, if the output is in a store."""
        if self.mirror:
            self.mirror.push()

    def update(self, **changes: Any) -> None:
        """Change the run file."""
        with self._lock:
            self.run = replace(self.run, **changes)
            storage.write_json_atomic(str(self._file), asdict(self.run))
            if self.mirror:
                self.mirror.put(self._file.name)

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
                    f"{self.place}/{self._file.name} was written by a newer lumos (it has {', '.join(unknown)}): "
                    f"install the lumos-ray that wrote it ({raw.get('provenance', {}).get('lumos')}), or name another "
                    "output"
                )
            return RunFile(**raw)
        except (AttributeError, ValueError, TypeError) as error:
            file = f"{self.place}/{self._file.name}"
            raise UserError(f"{file} cannot be read ({error}): name another output") from error

    def _open(self, config: TrainConfig, snapshot_digest: str, found: RunFile | None) -> RunFile:
        if found is None:
            # A name with a dot is the lock, or what a kill left of an atomic write.
            if any(not name.startswith(".") for name in storage.list_names(self.place)):
                raise UserError(
                    f"output = {self.place} is not empty and holds no training run: name another folder, or empty it"
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
            more = len(differences) - _SHOWN_DIFFERENCES
            shown = "; ".join([*differences[:_SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])])
            fits = not any(difference.startswith("model.") for difference in differences)
            fork = f", with fork_from={self.place} to begin with what that one has learnt" if fits else ""
            raise UserError(
                f"output = {self.place} holds another run ({shown}): name another output{fork}; or ask for the same "
                "run to continue it"
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


def _open_mirror(config: TrainConfig) -> Mirror:
    if config.tracking.uri is None:
        raise UserError(
            f"output = {config.output} is in a store, where MLflow cannot keep its database: set tracking.uri to a "
            "server (http://HOST:PORT), or to sqlite:///PATH for a file of this machine"
        )
    if not s3.is_s3(config.output):  # elsewhere nothing keeps a second driver away
        raise UserError(f"output = {config.output} is neither a local folder nor s3://: name one of these")
    return Mirror(config.output)


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
