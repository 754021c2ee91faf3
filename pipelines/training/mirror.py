"""A run's output that is kept in an object store: worked on in a temporary folder here, and carried there.

What the driver writes (``run.json``, ``metrics.jsonl``, samples, the exported model) goes to the store, so that a
driver which dies with its machine loses nothing: the next one, anywhere, goes on from what is there. Objects cannot be
appended to, so the newest lines of the record go to ``metrics.tail.jsonl`` before MLflow hears of them, and the whole
record with every checkpoint.
"""

import shutil
import tempfile
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO

from lumos.checkpoint import is_model_file
from pipelines import storage
from pipelines.storage import s3
from pipelines.storage.lock import check_lock
from pipelines.training.record import StepRecord

RECORD, TAIL = "metrics.jsonl", "metrics.tail.jsonl"
_PULLED = ("run.json", RECORD, TAIL, "phases.jsonl", "sampling_choice.json")
_PART = 8 << 20  # bytes of the record in memory while it is brought there
_MARK = "config.json"  # of a model's folder: there once the rest of it is


class Mirror:
    """The folder of a run here, and the place in the store that it stands for.

    Once another run has taken the place over (see ``pipelines.storage.lock``) a write is refused with a ``JobError``.
    """

    def __init__(self, uri: str) -> None:
        """A folder with the run file of that place, if there is one; the folder goes with this object."""
        self.uri = uri.rstrip("/")
        self.folder = Path(tempfile.mkdtemp(prefix="lumos-output-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._there: dict[str, tuple[int, int]] = {}  # size and time of the files here that the store has
        self._whole = 0  # bytes of the record in the store
        self._tail = 0  # bytes of it there with those of the tail
        self._writing = threading.Lock()
        s3.check_store(self.uri)
        self._pull("run.json")

    def pull(self, *, samples_after: int) -> None:
        """Bring what a driver goes on with: the record, and the samples of steps after that one."""
        for name in _PULLED:
            self._pull(name)
        for step in storage.list_names(storage.join(self.uri, "samples")):
            if int(step.removeprefix("step-")) > samples_after:
                for name in storage.list_names(storage.join(self.uri, "samples", step)):
                    self._pull(f"samples/{step}/{name}")
        record, tail = self.folder / RECORD, self.folder / TAIL
        if record.exists():
            self._whole = self._tail = record.stat().st_size
        if tail.exists():
            lines = tail.read_bytes().splitlines(keepends=True)
            with record.open("ab+") as file:
                file.seek(0)
                last = sum(1 for _ in file)  # a line a step, from the first
                file.writelines(line for line in lines if StepRecord.from_line(line).step > last)
            tail.unlink()

    def keep_record(self) -> None:
        """Bring the record's newest whole lines to the store."""
        record = self.folder / RECORD
        with self._writing:
            if not record.exists() or record.stat().st_size <= self._tail:
                return
            with record.open("rb") as file:
                file.seek(self._whole)
                lines, newline, _ = file.read().rpartition(b"\n")
            if newline:
                self._write(TAIL, lines + newline)
                self._tail = self._whole + len(lines) + 1

    def put(self, name: str) -> None:
        """Bring one small file to the store."""
        with self._writing:
            version = _version(self.folder / name)
            self._write(name, (self.folder / name).read_bytes())
            self._there[name] = version

    def push(self) -> None:
        """Bring every file that is new or changed to the store; a model counts there once all of it is there."""
        with self._writing:
            changed = [path for path in sorted(self.folder.rglob("*")) if self._is_new(path)]
            models = {path.parent for path in changed if path.parent.name.startswith("export")}
            for folder in filter(self._is_there, [*models]):
                models.remove(folder)
                self._there |= {self._name(path): _version(path) for path in folder.iterdir()}
            changed = [path for path in changed if self._is_new(path)]
            for folder in models:
                check_lock(self.uri)
                place = storage.join(self.uri, self._name(folder))
                storage.remove(storage.join(place, _MARK))
                remove_stale(place, folder)
            for path in sorted(changed, key=lambda path: path.name == _MARK):
                self._upload(path)
            for folder in models - {path.parent for path in changed if path.name == _MARK}:
                self._upload(folder / _MARK)

    def _is_there(self, folder: Path) -> bool:
        """Whether the store has this very model, as where the command of a finished run is given again."""
        there = {file.path: file for file in storage.list_files(storage.join(self.uri, self._name(folder)))}
        here = {path.name: path for path in folder.iterdir()}
        return there.keys() == here.keys() and all(
            there[name].size == path.stat().st_size
            and storage.sha256_file(there[name].uri) == storage.sha256_file(str(path))
            for name, path in here.items()
        )

    def _is_new(self, path: Path) -> bool:
        name = self._name(path)
        hidden = any(part.startswith(".") for part in Path(name).parts)
        return path.is_file() and not hidden and self._there.get(name) != _version(path)

    def _upload(self, path: Path) -> None:
        check_lock(self.uri)
        name, version = self._name(path), _version(path)
        fs, target = storage.filesystem(storage.join(self.uri, name))
        if name == RECORD:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".record-") as lines:
                length = _copy_lines(path, lines)
                fs.put_file(lines.name, target, chunksize=_PART, max_concurrency=1)
            self._whole = self._tail = length
        else:
            fs.put_file(str(path), target)
        self._there[name] = version

    def _write(self, name: str, data: bytes) -> None:
        check_lock(self.uri)
        storage.write_bytes_atomic(storage.join(self.uri, name), data)

    def _pull(self, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            fs, path = storage.filesystem(storage.join(self.uri, name))
            fs.get_file(path, str(target))
            self._there[name] = _version(target)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _copy_lines(path: Path, target: IO[bytes]) -> int:
    """Copy the whole lines of a file to which lines may be added meanwhile; their bytes."""
    length = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                length += target.write(line)
    target.flush()
    return length


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def remove_stale(target: str, model: Path) -> None:
    """Delete from a place in a store the files of a model that was there before, which those of a new one lack.

    An index that stayed would name the weights of the old one.
    """
    for name in storage.list_names(target):
        if is_model_file(name) and not (model / name).exists():
            storage.remove(storage.join(target, name))
