"""What a checkpoint of a run holds, which one a rerun continues from, and the record that goes with them.

A checkpoint folder, written by all workers (saving.py):

    engine/             DeepSpeed's files: weights, optimizer, moving average of the weights
    state.json          step, number of workers, identity of the run
    model.json          shape of the model, vocabulary and what else an export says; text_tokenizer.json beside it
    worker-00000.json   one per worker: names, sizes and SHA-256 of the files that worker wrote

Beside the checkpoints lies ``record/``: the record of the steps in parts, one per checkpoint, from the one before it. A
part is written before its checkpoint and never deleted, so a checkpoint does not grow with the steps. Older programs
kept the whole record in every checkpoint, as history.jsonl, and no SHA-256; both are still read.

There is no random state to keep: every draw comes from a stream named by its step (``streams``). A kill in the middle
of an upload leaves a folder whose files do not match those lists, and such a folder is not used.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow.fs
from ray.train import Checkpoint

from lumos.checkpoint import ModelInfo
from lumos.config import ModelConfig
from lumos.vocabulary import Vocabulary
from pipelines import storage
from pipelines.errors import UserError
from pipelines.training.record import StepRecord, read_records

STATE_FILE = "state.json"
MODEL_FILE = "model.json"
TEXT_TOKENIZER_FILE = "text_tokenizer.json"
RECORD_DIR = "record"
_HISTORY_FILE = "history.jsonl"  # of older programs
_ATTEMPT, _STEP = re.compile(r"attempt-\d{5,}"), re.compile(r"step-\d{8,}-[0-9a-f]{8}")
_PART = re.compile(r"(\d{8,})-(\d{8,})\.jsonl")
_READERS = 8  # files whose hashes are computed at a time
_BLOCK = 1 << 20  # bytes
_MOVE_AWAY = "Move that checkpoint away, to continue from the one before it"


@dataclass(frozen=True)
class LoopState:
    """Where a run stands."""

    step: int  # steps done; the plan's step to come next
    num_workers: int
    identity_hash: str
    skipped_in_a_row: int = 0  # steps without an update just before
    exported: bool = False  # of older programs: the folder holds the finished model as well


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint in storage."""

    checkpoint: Checkpoint
    state: LoopState

    @property
    def filesystem(self) -> Any:
        """Arrow's, that it is in."""
        return self.checkpoint.filesystem

    @property
    def name(self) -> str:
        """Of its folder; no two are alike."""
        return str(self.checkpoint.path.rstrip("/").rsplit("/", 1)[1])


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """``model.json``: what is exported besides weights and the text tokenizer's file."""

    config: ModelConfig
    vocabulary: Vocabulary
    info: ModelInfo

    def to_json(self) -> str:
        """As it stands in the file."""
        plain = {"config": asdict(self.config), "vocabulary": asdict(self.vocabulary), "info": self.info.to_dict()}
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelFile":
        """Inverse of :meth:`to_json`."""
        raw = json.loads(text)
        config: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in raw["config"].items()
        }
        return cls(
            config=ModelConfig(**config),
            vocabulary=Vocabulary(**raw["vocabulary"]),
            info=ModelInfo.from_dict(raw["info"]),
        )


def find_checkpoints(uri: str) -> list[StoredCheckpoint]:
    """Complete checkpoints under a folder or URI, newest step first. Incomplete ones are left out.

    Raises:
        UserError: if one is of a newer program.
    """
    filesystem, root = storage.arrow_filesystem(uri)
    found = []
    for attempt in _folders(filesystem, root, _ATTEMPT):
        for path in _folders(filesystem, attempt, _STEP):
            state = _complete_state(filesystem, path)
            if state is not None:
                found.append(StoredCheckpoint(Checkpoint(path, filesystem), state))
    return sorted(found, key=lambda stored: (stored.state.step, stored.checkpoint.path), reverse=True)


def next_attempt(uri: str) -> str:
    """Name for the checkpoints of one more driver: ``attempt-00001`` and so on."""
    filesystem, root = storage.arrow_filesystem(uri)
    numbers = [int(path.rsplit("-", 1)[1]) for path in _folders(filesystem, root, _ATTEMPT)]
    return f"attempt-{max(numbers, default=0) + 1:05d}"


def prune(uri: str, keep: Sequence[StoredCheckpoint]) -> None:
    """Delete every checkpoint folder but those to keep, incomplete ones included, and then attempts without any.

    What is not named as a checkpoint or an attempt is not touched.
    """
    filesystem, root = storage.arrow_filesystem(uri)
    kept = {stored.checkpoint.path for stored in keep}
    for attempt in _folders(filesystem, root, _ATTEMPT):
        folders = _folders(filesystem, attempt, _STEP)
        for path in folders:
            if path not in kept:
                filesystem.delete_dir(path)
        if not kept & set(folders):
            with suppress(FileNotFoundError):  # in an object store, a folder goes with the last of what is in it
                filesystem.delete_dir(attempt)


def open_checkpoint(uri: str) -> StoredCheckpoint | None:
    """The checkpoint in a folder, or None if there is none, or an incomplete one."""
    filesystem, path = storage.arrow_filesystem(uri.rstrip("/"))
    state = _complete_state(filesystem, path)
    return None if state is None else StoredCheckpoint(Checkpoint(path, filesystem), state)


def damaged_files(stored: StoredCheckpoint) -> list[str]:
    """Files whose SHA-256 is not the one written down, or that cannot be read; of older programs, none are known."""
    filesystem, path = stored.filesystem, stored.checkpoint.path
    wanted: dict[str, str] = {}
    for rank in range(stored.state.num_workers):
        files = json.loads(_read(filesystem, f"{path}/{list_name(rank)}"))
        wanted |= {name: entry["sha256"] for name, entry in files.items() if isinstance(entry, dict)}

    def is_damaged(name: str) -> bool:
        try:
            with filesystem.open_input_stream(f"{path}/{name}") as stream:
                digest = hashlib.sha256()
                while block := stream.read(_BLOCK):
                    digest.update(block)
                return digest.hexdigest() != wanted[name]
        except OSError:
            return True

    with ThreadPoolExecutor(_READERS) as pool:
        return [name for name, damaged in zip(wanted, pool.map(is_damaged, wanted), strict=True) if damaged]


def record_part(first: int, last: int) -> str:
    """Name of the part of the record with the steps from ``first`` to ``last``, below the storage folder."""
    return f"{RECORD_DIR}/{first:08d}-{last:08d}.jsonl"


def read_history(stored: StoredCheckpoint, uri: str, *, after: int = 0) -> Iterator[StepRecord]:
    """The record up to a checkpoint's step, from the step after ``after`` on; ``uri`` is the storage folder.

    Raises:
        UserError: if a part is damaged or missing.
    """
    path = f"{stored.checkpoint.path}/{_HISTORY_FILE}"
    filesystem = stored.filesystem
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
        lines = _read(filesystem, path).splitlines()
        yield from (record for record in read_records(lines, path, remedy=_MOVE_AWAY) if record.step > after)
        return
    for part in _parts_before(uri, stored.state.step, after=after):
        where = storage.join(uri, RECORD_DIR, part)
        for line in storage.read_bytes(where).splitlines():
            try:
                record = StepRecord.from_line(line)
            except ValueError as error:
                raise UserError(f"{where}: {error}. {_MOVE_AWAY}") from error
            if record.step > after:
                yield record


def _parts_before(uri: str, step: int, *, after: int) -> list[str]:
    """Names of the parts that make up the record from ``after`` to ``step``, in order."""
    folder = storage.join(uri, RECORD_DIR)
    names = storage.list_names(folder) if storage.is_dir(folder) else []
    first_of: dict[int, int] = {}  # by last step; of several, any will do: what was recorded twice is the same steps
    for name in names:
        if match := _PART.fullmatch(name):
            first, last = int(match[1]), int(match[2])
            first_of[last] = min(first, first_of.get(last, first))
    found = []
    while step > after:
        if step not in first_of:
            raise UserError(f"{folder} has no part that ends with step {step}, so the record has a gap. {_MOVE_AWAY}")
        found.append(f"{first_of[step]:08d}-{step:08d}.jsonl")
        step = first_of[step] - 1
    return found[::-1]


def write_record(uri: str, first: int, lines: Sequence[str]) -> None:
    """Write a part of the record, which begins with step ``first``; nothing where there are no lines."""
    if lines:
        name = record_part(first, first + len(lines) - 1)
        storage.write_bytes_atomic(storage.join(uri, name), "".join(line + "\n" for line in lines).encode())


def _folders(filesystem: Any, path: str, name: re.Pattern[str]) -> list[str]:
    """Folders in a folder, of those names."""
    selector = pyarrow.fs.FileSelector(path, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    folders = [info for info in infos if info.type == pyarrow.fs.FileType.Directory]
    return sorted(info.path for info in folders if name.fullmatch(info.base_name))


def _complete_state(filesystem: Any, path: str) -> LoopState | None:
    """The state of a checkpoint folder, or None if any worker's files are not all there."""
    try:
        data = _read(filesystem, f"{path}/{STATE_FILE}")
        if _is_damaged_state(filesystem, path, data):  # before it is taken for one of a newer program
            return None
        state = read_state(data, path)
        for rank in range(state.num_workers):
            files = json.loads(_read(filesystem, f"{path}/{list_name(rank)}"))
            infos = filesystem.get_file_info([f"{path}/{name}" for name in files])
            sizes = [entry["size"] if isinstance(entry, dict) else entry for entry in files.values()]
            if [info.size for info in infos] != sizes:
                return None
    except (AttributeError, FileNotFoundError, KeyError, NotADirectoryError, ValueError, TypeError):
        return None
    return state


def _is_damaged_state(filesystem: Any, path: str, data: bytes) -> bool:
    """Whether rank 0 wrote down another SHA-256 of the state than that of its file."""
    with suppress(FileNotFoundError):
        entry = json.loads(_read(filesystem, f"{path}/{list_name(0)}")).get(STATE_FILE)
        return isinstance(entry, dict) and entry["sha256"] != hashlib.sha256(data).hexdigest()
    return False


def _read(filesystem: Any, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def read_state(data: bytes, where: str) -> LoopState:
    """What ``state.json`` says; a ``UserError`` if a newer program wrote it."""
    raw = json.loads(data)
    unknown = sorted(raw.keys() - {each.name for each in fields(LoopState)})
    if unknown:  # not to be taken for an incomplete checkpoint, which would be deleted
        raise UserError(
            f"{where} is a checkpoint of a newer lumos (its state has {', '.join(unknown)}): install the lumos-ray "
            "that wrote it to continue this run, or begin another in another output"
        )
    return LoopState(**raw)


def list_name(rank: int) -> str:
    """Of the list of a worker's files."""
    return f"worker-{rank:05d}.json"
