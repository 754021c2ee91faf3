"""What a checkpoint of a run holds, how it is written by all workers, and which one a rerun continues from.

A checkpoint folder, merged by Ray Train from what every worker reports:

    engine/             DeepSpeed's files: weights, optimizer
    state.json          step, number of workers, identity of the run
    history.jsonl       the record of every step so far
    export/             the finished model, in the last checkpoint of a run only
    worker-00000.json   one per worker: names and sizes of the files that worker wrote

There is no random state to keep: every draw comes from a stream named by its step (``streams``). A kill in the middle
of an upload leaves a folder whose files do not match those lists, and such a folder is not used.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.fs
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from pipelines import storage
from pipelines.errors import UserError
from pipelines.training.engine import Engine
from pipelines.training.record import StepRecord, read_records

ENGINE_DIR = "engine"
EXPORT_DIR = "export"
STATE_FILE = "state.json"
HISTORY_FILE = "history.jsonl"
_ATTEMPT, _STEP = re.compile(r"attempt-\d{5,}"), re.compile(r"step-\d{8,}-[0-9a-f]{8}")


@dataclass(frozen=True)
class LoopState:
    """Where a run stands."""

    step: int  # steps done; the plan's step to come next
    num_workers: int
    identity_hash: str
    skipped_in_a_row: int = 0  # steps without an update just before
    exported: bool = False  # the folder holds the finished model


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint in storage."""

    checkpoint: Checkpoint
    state: LoopState


def save(engine: Engine, state: LoopState, history: Sequence[str], folder: Path, *, rank: int) -> None:
    """Write a checkpoint and report it to Ray Train. Every worker must call it; returns when it is in storage.

    ``folder`` is this worker's own, and temporary; what is in it already goes along. ``history`` has the lines of the
    record up to ``state.step``; rank 0's are used.
    """
    engine.save_checkpoint(str(folder), tag=ENGINE_DIR)
    if rank == 0:
        (folder / STATE_FILE).write_text(json.dumps(asdict(state)))
        (folder / HISTORY_FILE).write_text("".join(line + "\n" for line in history))
    files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    (folder / _list_name(rank)).write_text(json.dumps(files))
    ray.train.report(
        {"step": state.step},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{state.step:08d}-{uuid4().hex[:8]}",
        checkpoint_upload_mode=CheckpointUploadMode.SYNC,
        delete_local_checkpoint_after_upload=True,
    )


def restore(engine: Engine, folder: Path) -> tuple[LoopState, list[str]]:
    """Load a checkpoint into an engine; returns where the run stood and its record. Every worker must call it."""
    loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE_DIR)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
    state = _read_state((folder / STATE_FILE).read_bytes(), str(folder))
    return state, (folder / HISTORY_FILE).read_text().splitlines()


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


def read_history(stored: StoredCheckpoint) -> Iterator[StepRecord]:
    """The record a checkpoint carries.

    Raises:
        UserError: if it is damaged.
    """
    path = f"{stored.checkpoint.path}/{HISTORY_FILE}"
    lines = _read(stored.checkpoint.filesystem, path).splitlines()
    return read_records(lines, path, remedy="Move that checkpoint away, to continue from the one before it")


def copy_export(stored: StoredCheckpoint, target: Path) -> None:
    """Bring the finished model of a checkpoint to ``target``, complete or not at all."""
    building = target.with_name(f".{target.name}-new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    source = stored.checkpoint.filesystem
    pyarrow.fs.copy_files(f"{stored.checkpoint.path}/{EXPORT_DIR}", str(building), source_filesystem=source)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)


def _folders(filesystem: Any, path: str, name: re.Pattern[str]) -> list[str]:
    """Folders in a folder, of those names."""
    selector = pyarrow.fs.FileSelector(path, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    folders = [info for info in infos if info.type == pyarrow.fs.FileType.Directory]
    return sorted(info.path for info in folders if name.fullmatch(info.base_name))


def _complete_state(filesystem: Any, path: str) -> LoopState | None:
    """The state of a checkpoint folder, or None if any worker's files are not all there."""
    try:
        state = _read_state(_read(filesystem, f"{path}/{STATE_FILE}"), path)
        for rank in range(state.num_workers):
            files = json.loads(_read(filesystem, f"{path}/{_list_name(rank)}"))
            infos = filesystem.get_file_info([f"{path}/{name}" for name in files])
            if [info.size for info in infos] != list(files.values()):
                return None
    except (AttributeError, FileNotFoundError, ValueError, TypeError):
        return None
    return state


def _read(filesystem: Any, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def _read_state(data: bytes, where: str) -> LoopState:
    raw = json.loads(data)
    unknown = sorted(raw.keys() - {each.name for each in fields(LoopState)})
    if unknown:  # not to be taken for an incomplete checkpoint, which would be deleted
        raise UserError(
            f"{where} is a checkpoint of a newer lumos (its state has {', '.join(unknown)}): install the lumos-ray "
            "that wrote it to continue this run, or begin another in another output"
        )
    return LoopState(**raw)


def _list_name(rank: int) -> str:
    return f"worker-{rank:05d}.json"
