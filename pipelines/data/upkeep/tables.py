"""What upkeep reads of a dataset: its snapshots, its stage tables, and the rows that a snapshot was made from."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from pipelines import storage
from pipelines.data.snapshot.read import Snapshot, list_snapshots
from pipelines.data.stage.table import STAGES, read_parts, table_parts
from pipelines.errors import UserError


def snapshots_of(dataset: str) -> list[str]:
    """Ids of a dataset's published snapshots, oldest first; raises a ``UserError`` if there is no such dataset."""
    snapshots = list_snapshots(dataset)
    if not snapshots and not storage.is_dir(storage.join(dataset, STAGES)):
        raise UserError(f"{dataset} is no dataset; name the folder or s3:// prefix that `lumos curate` wrote to")
    return snapshots


def list_tables(dataset: str) -> Iterator[tuple[str, str]]:
    """Stage and configuration hash of every stage table."""
    folder = storage.join(dataset, STAGES)
    for stage in storage.list_names(folder):
        for name in storage.list_names(storage.join(folder, stage)):
            yield stage, name


def snapshot_rows(
    snapshot: Snapshot, stage: str, column: str, values: Iterable[str], columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Rows of a stage table that a snapshot was made from, file by file; none where it is not there any more.

    Chosen are those whose ``column`` has one of the values; ``columns`` of them are read, all by default.
    """
    return read_parts(snapshot_parts(snapshot, stage), columns, rows=(column, sorted(set(values))))


def snapshot_parts(snapshot: Snapshot, stage: str) -> list[str]:
    """URIs of the files of a stage table that a snapshot was made from; none where it is not there any more."""
    name = snapshot.manifest.created_from.get("stage_hashes", {}).get(stage)
    if snapshot.dataset is None or not name:
        return []
    return table_parts(storage.join(snapshot.dataset, STAGES, stage, name))
