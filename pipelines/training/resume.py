"""Where a run goes on from: its own newest good checkpoint, or that of another run from which it is forked."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tqdm import tqdm

from pipelines import storage
from pipelines.config import config_hash
from pipelines.errors import UserError
from pipelines.storage.lock import dataset_lock, local_lock
from pipelines.training.checkpoints import (
    StoredCheckpoint,
    damaged_files,
    find_checkpoints,
    has_whole_record,
    read_history,
    write_record,
)
from pipelines.training.export import locate, read_model_file
from pipelines.training.output import Output
from pipelines.training.prepare import PreparedRun
from pipelines.training.record import History

_PART_STEPS = 10_000  # of the record, in a part of what is taken over


@dataclass(frozen=True)
class Beginning:
    """What a driver's workers begin with."""

    checkpoint: StoredCheckpoint | None  # None: at step 0
    kept: Sequence[StoredCheckpoint]  # of this run, newest first, without those known to be damaged

    @property
    def step(self) -> int:
        """Steps done."""
        return self.checkpoint.state.step if self.checkpoint else 0


def describe_fork(where: str) -> dict[str, str]:
    """What ``fork_from`` names: a digest of it, and its run in MLflow where that is known.

    Raises:
        UserError: if there is no such checkpoint; the message names the steps that are kept.
    """
    try:
        stored = locate(where)
    except UserError as error:
        raise UserError(f"fork_from = {error}") from error
    run_file = storage.join(os.path.expanduser(where.rpartition("@")[0] or where), "run.json")
    parent = storage.read_json(run_file).get("run_id") if storage.exists(run_file) else None
    return {"from": where, "digest": _digest(stored), **({"run_id": parent} if parent else {})}


def _digest(stored: StoredCheckpoint) -> str:
    return config_hash([stored.name, stored.state.identity_hash])


@contextmanager
def held(output: Output) -> Iterator[None]:
    """Keep other drivers from the output folder and from the storage of its checkpoints within a block.

    Raises:
        UserError: if another one trains there.
    """
    name = f"output = {output.place}"
    with dataset_lock(output.place, name=name) if output.mirror else local_lock(output.folder, name):
        output.resume()
        if output.storage.startswith(f"{output.place}/"):
            yield
            return
        with dataset_lock(output.storage, name=f"checkpoint.storage {output.storage}"):
            yield


def find_beginning(prepared: PreparedRun, output: Output) -> Beginning:
    """The newest checkpoint of a run whose files are as they were written, or what it is forked from.

    A damaged one is told of, and passed over. Nothing is deleted here.

    Raises:
        UserError: if the checkpoints there are of another run, or there is none to fork from.
    """
    config = prepared.config
    accepted = {output.identity_hash, config_hash(config.older_identity()), config_hash(output.run.identity)}
    found = find_checkpoints(output.storage)
    for index, stored in enumerate(found):
        if stored.state.identity_hash not in accepted:
            raise UserError(f"{stored.uri} is a checkpoint of another run: name another checkpoint.storage or output")
        files = damaged_files(stored)
        if not files:
            return Beginning(stored, found[index:])
        before = f"that of step {found[index + 1].state.step}" if index + 1 < len(found) else "the run's beginning"
        tqdm.write(
            f"warning: the checkpoint of step {stored.state.step} is damaged ({', '.join(files)} in "
            f"{stored.uri}); {before} is used",
            file=sys.stderr,
        )
    if config.fork_from is None:
        return Beginning(None, [])
    parent = locate(config.fork_from)
    if output.fork is not None and output.fork["digest"] != _digest(parent):
        raise UserError(
            f"fork_from = {config.fork_from} is now {parent.uri}, and was another checkpoint when this run "
            "began, which has none of its own yet: name another output, and in fork_from a step that stays"
        )
    _check_fork(prepared, parent)
    return Beginning(parent, [])


def _check_fork(prepared: PreparedRun, parent: StoredCheckpoint) -> None:
    model = read_model_file(parent)
    pairs: list[tuple[str, Any, Any]] = [
        ("model", model.config, prepared.model),
        ("vocabulary", model.vocabulary, prepared.vocabulary),
    ]
    for what, there, here in pairs:
        different = [name for name, value in vars(here).items() if vars(there)[name] != value]
        if different:
            raise UserError(
                f"fork_from = {prepared.config.fork_from} is of another {what}: "
                f"{', '.join(f'{name} = {vars(there)[name]} there, {vars(here)[name]} here' for name in different)}"
            )
    if parent.state.step >= prepared.config.steps:
        raise UserError(
            f"fork_from = {prepared.config.fork_from} is at step {parent.state.step}, and steps = "
            f"{prepared.config.steps}: raise steps, which count from the parent's beginning"
        )


def take_over_record(beginning: Beginning, output: Output, history: History) -> None:
    """Bring the record up to the checkpoint into the output, and where the checkpoint is not ours, into the storage."""
    stored = beginning.checkpoint
    if stored is None:
        return
    history.take_over(read_history(stored, after=history.last_step))
    if has_whole_record(stored) or not beginning.kept:  # later checkpoints hold the record of their own steps only
        records, first = islice(history.read(), stored.state.step), 1
        while lines := [record.to_line() for record in islice(records, _PART_STEPS)]:
            write_record(output.storage, first, lines)
            first += len(lines)
