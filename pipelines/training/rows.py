"""Rows of a run by their place in its plan: read one by one, and named."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.data.snapshot.rows import RowReader
from pipelines.training.prepare import PreparedRun

_CACHED_BYTES = 512 << 20  # decoded row groups that the readers of a run keep together


@dataclass(frozen=True)
class RowName:
    """Which clip a row of a step is."""

    dataset: str  # URI of the snapshot
    clip_id: str


def open_rows(run: PreparedRun, columns: Sequence[str]) -> tuple[RowReader, ...]:
    """A reader for each dataset of a run."""
    return tuple(
        RowReader(snapshot, columns, max_bytes=_CACHED_BYTES // len(run.datasets)) for snapshot in run.datasets
    )


def row_names(run: PreparedRun, step: int) -> list[RowName]:
    """The clips of all rows of a global step (0-based), in the order of the plan."""
    planned, readers = run.plan().step(step), open_rows(run, ["clip_id"])
    bucket = planned.bucket
    reader = readers[bucket.dataset]
    return [RowName(reader.snapshot.uri, reader.row(bucket.index, row)["clip_id"]) for row in planned.rows]
