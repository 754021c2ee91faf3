"""Inputs of a stage as Ray Data reads them."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata


class BlockSource(Datasource):
    """Tables of this process, each a block for the workers.

    ``ray.data.from_arrow`` has workers look at each block first: that starts as many processes as there are CPUs, of
    two seconds of computing each. These are read by the worker that computes.
    """

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes: int = sum(table.nbytes for table in tables)
        self._tasks = [_read_task(table) for table in tables]

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all blocks."""
        return self._bytes

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One task per table, whatever ``parallelism`` Ray wishes for."""
        return self._tasks


def _read_task(table: pa.Table) -> ReadTask:
    stored = ray.put(table)
    about = BlockMetadata(num_rows=table.num_rows, size_bytes=table.nbytes, input_files=None, exec_stats=None)
    return ReadTask(lambda: [ray.get(stored)], about, schema=table.schema)
