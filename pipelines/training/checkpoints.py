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
from dataclasses import asdict, dataclass, fields
from typing import Any

from lumos.checkpoint import ModelInfo
from lumos.config import ModelConfig
from lumos.vocabulary import Vocabulary
from pipelines import storage
from pipelines.errors import UserError
from pipelines.training.record import StepRecord, check_record

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

    uri: str  # of its folder; of a local one, the whole path
    state: LoopState

    @property
    def name(self) -> str:
        """Of its folder; no two are alike."""
        return self.uri.rpartition("/")[2]


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
    folders = [folder for attempt in _folders(uri, _ATTEMPT) for folder in _folders(attempt, _STEP)]
    found = [stored for folder in folders if (stored := open_checkpoint(folder)) is not None]
    return sorted(found, key=lambda stored: (stored.state.step, stored.uri), reverse=True)


def open_checkpoint(uri: str) -> StoredCheckpoint | None:
    """The checkpoint in a folder, or None if there is none, or one whose files are not all there.

    Raises:
        UserError: if it is of a newer program.
    """
    uri = storage.filesystem(uri)[1] if storage.is_local(uri) else uri.rstrip("/")
    try:
        data = storage.read_bytes(storage.join(uri, STATE_FILE))
        entry = _listed_files(uri, 1).get(STATE_FILE)
        if isinstance(entry, dict) and entry["sha256"] != hashlib.sha256(data).hexdigest():
            return None  # damaged, and not of a newer program
        state = read_state(data, uri)
        listed = _listed_files(uri, state.num_workers)
        sizes = {name: entry["size"] if isinstance(entry, dict) else entry for name, entry in listed.items()}
        there = {file.path: file.size for file in storage.list_files(uri)}
        if any(there.get(name) != size for name, size in sizes.items()):
            return None
    except (AttributeError, FileNotFoundError, KeyError, NotADirectoryError, ValueError, TypeError):
        return None
    return StoredCheckpoint(uri, state)


def next_attempt(uri: str) -> str:
    """Name for the checkpoints of one more driver: ``attempt-00001`` and so on."""
    numbers = [int(folder.rsplit("-", 1)[1]) for folder in _folders(uri, _ATTEMPT)]
    return f"attempt-{max(numbers, default=0) + 1:05d}"


def prune(uri: str, keep: Sequence[StoredCheckpoint]) -> None:
    """Delete every checkpoint folder but those to keep, incomplete ones included, and then attempts without any.

    What is not named as a checkpoint or an attempt is not touched.
    """
    kept = {stored.name for stored in keep}
    for attempt in _folders(uri, _ATTEMPT):
        others = [folder for folder in _folders(attempt, _STEP) if folder.rpartition("/")[2] not in kept]
        for folder in others:
            storage.remove(folder)
        if not _folders(attempt, _STEP):
            storage.remove(attempt)


def checksum(uri: str) -> str:
    """Hex SHA-256 of a file, read in pieces of which none is kept, not even on the disk."""
    filesystem, path = storage.arrow_filesystem(uri)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def damaged_files(stored: StoredCheckpoint) -> list[str]:
    """Files whose SHA-256 is not the one written down, or that cannot be read; of older programs, none are known."""
    listed = _listed_files(stored.uri, stored.state.num_workers)
    wanted = {name: entry["sha256"] for name, entry in listed.items() if isinstance(entry, dict)}

    def is_damaged(name: str) -> bool:
        try:
            return bool(checksum(storage.join(stored.uri, name)) != wanted[name])
        except OSError:
            return True

    with ThreadPoolExecutor(_READERS) as pool:
        return [name for name, damaged in zip(wanted, pool.map(is_damaged, wanted), strict=True) if damaged]


def record_part(first: int, last: int) -> str:
    """Name of the part of the record with the steps from ``first`` to ``last``, below the storage folder."""
    return f"{RECORD_DIR}/{first:08d}-{last:08d}.jsonl"


def has_whole_record(stored: StoredCheckpoint) -> bool:
    """Whether a checkpoint holds the record of all steps, as those of older programs."""
    return storage.exists(storage.join(stored.uri, _HISTORY_FILE))


def read_history(stored: StoredCheckpoint, *, after: int = 0) -> Iterator[StepRecord]:
    """The record up to a checkpoint's step, from the step after ``after`` on.

    Raises:
        UserError: if a part is damaged or missing.
    """
    whole = has_whole_record(stored)
    files = [(storage.join(stored.uri, _HISTORY_FILE), 1)] if whole else _parts_before(stored, after=after)
    for file, first in files:
        for number, line in enumerate(storage.read_bytes(file).splitlines()):
            record = check_record(line, first + number, f"{file}, line {number + 1}", remedy=_MOVE_AWAY)
            if record.step > after:
                yield record


def _parts_before(stored: StoredCheckpoint, *, after: int) -> list[tuple[str, int]]:
    """The parts that make up the record from ``after`` to a checkpoint, in order: URI and first step of each."""
    root = stored.uri.rsplit("/", 2)[0]
    folder = storage.join(root, RECORD_DIR)
    first_of: dict[int, int] = {}  # by last step; of several, any will do: what was recorded twice is the same steps
    for name in storage.list_names(folder):
        if match := _PART.fullmatch(name):
            first, last = int(match[1]), int(match[2])
            first_of[last] = min(first, first_of.get(last, first))
    found, step = [], stored.state.step
    while step > after:
        if step not in first_of:
            raise UserError(f"{folder} has no part that ends with step {step}, so the record has a gap. {_MOVE_AWAY}")
        found.append((storage.join(root, record_part(first_of[step], step)), first_of[step]))
        step = first_of[step] - 1
    return found[::-1]


def write_record(uri: str, first: int, lines: Sequence[str]) -> None:
    """Write a part of the record, which begins with step ``first``; nothing where there are no lines."""
    if lines:
        name = record_part(first, first + len(lines) - 1)
        storage.write_bytes_atomic(storage.join(uri, name), "".join(line + "\n" for line in lines).encode())


def _folders(uri: str, name: re.Pattern[str]) -> list[str]:
    """What is in a folder under such names."""
    return [storage.join(uri, each) for each in storage.list_names(uri) if name.fullmatch(each)]


def _listed_files(uri: str, num_workers: int) -> dict[str, Any]:
    """What workers wrote down of their files: size and SHA-256; older programs, the size alone."""
    lists = [storage.read_json(storage.join(uri, list_name(rank))) for rank in range(num_workers)]
    return {name: entry for files in lists for name, entry in files.items()}


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
