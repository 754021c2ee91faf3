"""Rows of a run by their place in its plan: read one by one, and named."""

from collections.abc import Sequence

from pipelines.data.snapshot.rows import RowReader
from pipelines.training.prepare import PreparedRun

_CACHED_BYTES = 512 << 20  # decoded row groups that the readers of a run keep together


def open_rows(run: PreparedRun, columns: Sequence[str]) -> tuple[RowReader, ...]:
    """A reader for each dataset of a run."""
    return tuple(
        RowReader(snapshot, columns, max_bytes=_CACHED_BYTES // len(run.datasets)) for snapshot in run.datasets
    )


def clips_of_step(run: PreparedRun, step: int) -> tuple[str, list[str]]:
    """The snapshot (its URI) and the clips of all rows of a global step (0-based), in the order of the plan."""
    planned, readers = run.plan().step(step), open_rows(run, ["clip_id"])
    reader = readers[planned.bucket.dataset]
    return reader.snapshot.uri, [reader.row(planned.bucket.index, row)["clip_id"] for row in planned.rows]
