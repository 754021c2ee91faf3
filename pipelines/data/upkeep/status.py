"""Looking after a dataset's stage tables: what is there, what to try again, what no snapshot needs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.data.keys import sources_of
from pipelines.data.reasons import CLASSES, Failure, parse_failure
from pipelines.data.settings import stage_place
from pipelines.data.snapshot.ledger import count_reasons
from pipelines.data.snapshot.read import MANIFEST, SNAPSHOTS, Snapshot, open_snapshots
from pipelines.data.snapshot.removals import read_removed
from pipelines.data.stage.columns import parquet_bytes
from pipelines.data.stage.log import RunRecord, last_run
from pipelines.data.stage.stage import ERROR, WORK_KEY
from pipelines.data.stage.table import STAGES, read_columns, table_parts
from pipelines.data.upkeep.tables import list_tables, snapshots_of
from pipelines.data.video.decode import CRASHES, CrashLog
from pipelines.errors import UserError
from pipelines.parquet import open_parquet
from pipelines.storage.lock import check_lock, dataset_lock

_NOT_OF_SOURCES = ("sources", "texts")  # stages whose keys do not begin with a source's content hash


@dataclass(frozen=True, kw_only=True)
class TableStatus:
    """One stage table."""

    stage: str
    hash: str  # of the stage's configuration
    rows: int  # committed rows
    parts: int  # files they are in
    damaged: int  # of these, files that cannot be read; their rows are not counted
    failed: dict[str, int]  # rows that hold a failure, by its code and class, such as "decode_error (transient)"
    used_by: tuple[str, ...]  # snapshots made from it, oldest first


@dataclass(frozen=True, kw_only=True)
class DatasetStatus:
    """A dataset at a glance."""

    snapshots: tuple[str, ...]  # ids, oldest first
    counts: dict[str, int]  # of the newest snapshot: ledger rows by status
    reasons: dict[str, int]  # likewise: rows not kept by "status: class of reason", most frequent first
    tables: tuple[TableStatus, ...]  # stage tables, in the order of the work
    run: RunRecord | None  # what the last run does or did; None before the first

    def __str__(self) -> str:
        lines = [f"snapshots: {', '.join(self.snapshots) or 'none yet'}"]
        if self.snapshots:
            lines.append(f"newest: {'  '.join(f'{name} {count}' for name, count in self.counts.items())}")
            lines += [f"  {count:6d}  {reason}" for reason, count in self.reasons.items()]
        if self.run is not None:
            lines.append(str(self.run))
        lines.append(f"{'stage':18s} {'config':18s} {'rows':>9s} {'files':>6s}  used by")
        for table in self.tables:
            used = table.used_by[-1] if table.used_by else "no snapshot"
            lines.append(f"{table.stage:18s} {table.hash:18s} {table.rows:9d} {table.parts:6d}  {used}")
            if table.damaged:
                lines.append(f"{'':38s}{table.damaged:9d} damaged files: give `lumos data repair`")
            lines += [f"{'':38s}{count:9d} failed: {code}" for code, count in table.failed.items()]
        return "\n".join(lines)


def dataset_status(dataset: str) -> DatasetStatus:
    """What a dataset holds; a ``UserError`` if there is none."""
    ids = snapshots_of(dataset)
    snapshots = open_snapshots(dataset, ids)
    used = _users(snapshots)
    tables = sorted(list_tables(dataset), key=lambda table: (stage_place(table[0]), table))
    return DatasetStatus(
        snapshots=tuple(ids),
        counts=snapshots[-1].manifest.ledger.counts if snapshots else {},
        reasons=count_reasons(snapshots[-1].ledger_pieces(["status", "reason"])) if snapshots else {},
        tables=tuple(_table_status(dataset, stage, name, used.get(f"{stage}/{name}", [])) for stage, name in tables),
        run=last_run(dataset),
    )


def _table_status(dataset: str, stage: str, name: str, used_by: list[str]) -> TableStatus:
    parts = table_parts(storage.join(dataset, STAGES, stage, name))
    rows = damaged = 0
    failed: Counter[str] = Counter()
    for part in parts:
        try:
            failures = _failures(part)
        except UnusablePartError:
            damaged += 1
        else:
            rows += len(failures)
            failed.update(failure.kind for failure in failures if failure)
    by_count = dict(sorted(failed.items(), key=lambda item: (-item[1], item[0])))
    return TableStatus(
        stage=stage, hash=name, rows=rows, parts=len(parts), damaged=damaged, failed=by_count, used_by=tuple(used_by)
    )


def retry(dataset: str, failure_class: str) -> dict[str, int]:
    """Forget committed failures, so that the next run computes their inputs again; tells how many, by stage.

    Args:
        dataset: The dataset.
        failure_class: "transient", "permanent", or the code of a failure such as "decode_error".

    Raises:
        UserError: if there is no such dataset, a run is using it, or there is no such code.
    """
    snapshots_of(dataset)
    forgotten: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    with dataset_lock(dataset):
        for stage, name in list_tables(dataset):
            uri = storage.join(dataset, STAGES, stage, name)
            crashes = CrashLog(storage.join(uri, CRASHES))
            for part in table_parts(uri):
                failures = _failures(part)
                seen.update(failure.kind for failure in failures if failure)
                chosen = [
                    failure is not None and failure_class in (failure.code, failure.failure_class)
                    for failure in failures
                ]
                if any(chosen):
                    check_lock(dataset)
                    forgotten[stage] += sum(chosen)
                    table = read_columns(part, None)
                    for key in table[WORK_KEY].filter(pa.array(chosen)).to_pylist():
                        crashes.forget(key)
                    _rewrite(part, table.filter(pa.array([not flag for flag in chosen])))
    if seen and not forgotten and failure_class not in CLASSES:
        told = ", ".join(f"{count} {code}" for code, count in seen.most_common())
        raise UserError(f"no failure is {failure_class}; there are {told}: name transient, permanent or a code")
    return dict(forgotten)


def collect_garbage(dataset: str, *, dry_run: bool, keep: int | None = None) -> list[str]:
    """Delete what no snapshot needs: stage tables of configurations that none was made from, rows of removed sources.

    Tables that the newest snapshot was not made from but an older one was stay, as a later config may return to them;
    so do rows of a removed source that an older snapshot holds.

    Args:
        dataset: The dataset.
        dry_run: Only say what would go, relative to the dataset.
        keep: Snapshots that stay, the newest ones; the others go first. Default: all.

    Raises:
        UserError: if there is no such dataset, a run is using it, or it has no snapshot yet (all would go).
    """
    snapshots_of(dataset)
    with dataset_lock(dataset):
        snapshots = snapshots_of(dataset)  # those of a run that has just ended among them
        if not snapshots:
            raise UserError(f"dataset {dataset} has no published snapshot yet: what its stages hold is all there is")
        snapshots = snapshots[-keep:] if keep else snapshots
        opened = open_snapshots(dataset, snapshots)
        used = _users(opened)
        unused = [f"{STAGES}/{stage}/{name}" for stage, name in list_tables(dataset) if f"{stage}/{name}" not in used]
        folder = storage.join(dataset, SNAPSHOTS)
        unused += [f"{SNAPSHOTS}/{name}" for name in storage.list_names(folder) if name not in snapshots]
        for path in unused if not dry_run else ():
            check_lock(dataset)
            storage.remove(storage.join(dataset, path, MANIFEST))  # first, so that no half of a snapshot passes for one
            storage.remove(storage.join(dataset, path))
        tables = [table for table in list_tables(dataset) if "/".join(table) in used]
        return unused + _drop_removed(dataset, tables, opened, dry_run=dry_run)


def _drop_removed(
    dataset: str, tables: Sequence[tuple[str, str]], snapshots: Sequence[Snapshot], *, dry_run: bool
) -> list[str]:
    """Take the rows of removed sources that no snapshot holds out of stage tables; tells how many were where.

    What stays is the content hash in the table "sources", by which such a source is known again.
    """
    gone = set(read_removed(dataset))
    for snapshot in snapshots if gone else ():
        for piece in snapshot.ledger_pieces(["source_id", "status"]):
            gone -= set(pc.unique(piece.filter(pc.equal(piece["status"], "kept"))["source_id"]).to_pylist())
    told = []
    for stage, name in tables if gone else ():
        if stage in _NOT_OF_SOURCES:
            continue
        count = 0
        for part in table_parts(storage.join(dataset, STAGES, stage, name)):
            keys = read_columns(part, [WORK_KEY])[WORK_KEY]
            theirs = pc.is_in(sources_of(keys), pa.array(sorted(gone)))
            if found := pc.sum(theirs).as_py():
                count += found
                if not dry_run:
                    check_lock(dataset)
                    _rewrite(part, read_columns(part, None).filter(pc.invert(theirs)))
        if count:
            told.append(f"{count} rows of removed sources in {STAGES}/{stage}/{name}")
    return told


def _users(snapshots: Sequence[Snapshot]) -> dict[str, list[str]]:
    """Ids of snapshots by "stage/hash" of the tables they were made from."""
    used: dict[str, list[str]] = {}
    for manifest in (snapshot.manifest for snapshot in snapshots):
        for stage, name in manifest.created_from.get("stage_hashes", {}).items():
            used.setdefault(f"{stage}/{name}", []).append(manifest.snapshot_id)
    return used


class UnusablePartError(UserError):
    """A file of a stage table that cannot be read."""


def _failures(part: str) -> list[Failure | None]:
    """The failure of each row, or None. Codes and scores are not read."""
    try:
        with storage.open_ranges(part) as file:
            parquet = open_parquet(file)
            if ERROR not in parquet.schema_arrow.names:
                return [None] * parquet.metadata.num_rows
            errors = parquet.read(columns=[ERROR], use_threads=False)[ERROR].to_pylist()
    except pa.ArrowException as error:
        raise UnusablePartError(f"{part} is damaged ({error}): `lumos data repair` drops it") from error
    return [None if error is None else parse_failure(error) for error in errors]


def _rewrite(part: str, table: pa.Table) -> None:
    """Put a table in place of a file, its rows in groups as large as the file's own."""
    if table.num_rows:
        with storage.open_ranges(part) as file:
            rows = open_parquet(file).metadata.row_group(0).num_rows
        storage.write_bytes_atomic(part, parquet_bytes(table, row_group_rows=rows))
    else:
        storage.remove(part)
