"""The durable table of a stage: committed parts, each a file; readers see each key once."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import storage
from pipelines.data.stage.columns import (
    contained,
    parquet_bytes,
    positions,
    release_memory,
    widened,
)
from pipelines.data.stage.stage import ERROR, WORK_KEY, Row, Stage
from pipelines.errors import JobError
from pipelines.parquet import read_parquet, read_parquet_rows

STAGES = "stages"  # folder of a dataset
PART = "part"  # column that any table has when it is read: number of the file, among ``StageTable.parts``
_READERS = 16  # threads, as a store takes long to answer
_LOCAL_READERS = 2  # of files of this machine: more of them take longer, and each keeps memory for itself
_PIECE_ROWS = 1 << 16
_PIECE_BYTES = 1 << 27
_PART_FIELD = pa.field(PART, pa.int32())


class StageTable:
    """The committed rows of one stage and configuration."""

    def __init__(self, dataset: str, stage: Stage) -> None:
        self.uri = storage.join(dataset, STAGES, stage.name, stage.hash)
        self.schema = stage.schema

    @property
    def readable(self) -> pa.Schema:
        """All columns that can be read."""
        return self.schema.append(_PART_FIELD)

    def parts(self) -> list[str]:
        """URIs of the committed files, sorted."""
        return table_parts(self.uri)

    def keys(self) -> pa.Array:
        """All keys that are done."""
        return self.done()[0]

    def done(self) -> tuple[pa.Array, pa.Table]:
        """All keys that are done, and the rows of those that failed, ``work_key`` and ``error``, each key once."""
        columns = [name for name in (WORK_KEY, ERROR) if name in self.schema.names]
        keys: list[pa.Array] = []
        failed = [pa.schema([(WORK_KEY, pa.string()), (ERROR, pa.string())]).empty_table()]
        for table in read_parts(self.parts(), columns):
            keys += table[WORK_KEY].chunks
            if ERROR in columns and table[ERROR].null_count < table.num_rows:
                failed.append(table.filter(pc.is_valid(table[ERROR])).cast(failed[0].schema))
        release_memory()
        failures = pa.concat_tables(failed).group_by(WORK_KEY, use_threads=False).aggregate([(ERROR, "first")])
        return pc.unique(widened(pa.chunked_array(keys, pa.string()))), failures.rename_columns([WORK_KEY, ERROR])

    def pieces(
        self,
        columns: Sequence[str],
        keys: pa.Array | pa.ChunkedArray,
        *,
        parts: Sequence[str] | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        """The rows of some keys, each key's from one part, some parts at a time; memory holds one piece.

        Args:
            columns: Wanted columns; ``PART`` may be among them.
            keys: No key twice.
            parts: As they were listed, for who goes by ``PART``; others may come meanwhile.

        Yields:
            For each row the place of its key among ``keys``, and the rows: ``work_key`` and ``columns``.

        Raises:
            JobError: the table lacks a key.
        """
        schema = pa.schema([self.schema.field(name) for name in dict.fromkeys([WORK_KEY, *columns]) if name != PART])
        wanted = widened(keys)
        seen = np.zeros(len(wanted) + 1, bool)
        seen[-1] = True  # where -1, the place of what is not wanted, leads
        read = (
            _as_schema(table, schema) for table in read_parts(self.parts() if parts is None else parts, schema.names)
        )
        if PART in columns:
            read = (
                table.append_column(_PART_FIELD, pa.array(np.full(table.num_rows, number, np.int32)))
                for number, table in enumerate(read)
            )
        for tables in _grouped(read, max(_PIECE_ROWS, len(wanted) // 4)):  # each time all wanted keys are hashed
            group = pa.concat_tables(tables)
            places = pc.fill_null(positions(group[WORK_KEY], wanted), -1).to_numpy().astype(np.int64)
            chosen = np.zeros(group.num_rows, bool)
            start = 0
            for table in tables:
                own = slice(start, start + table.num_rows)
                chosen[own] = ~seen[places[own]]
                seen[places[own]] = True
                start = own.stop
            if chosen.all():  # nothing is copied
                yield places, group
            elif chosen.any():
                yield places[chosen], group.filter(pa.array(chosen))
        release_memory()
        if not seen.all():
            example = wanted[int(np.flatnonzero(~seen)[0])]
            raise JobError(
                f"{self.uri} lacks {(~seen).sum()} of {len(wanted)} rows, such as that of {example}: files of it were "
                "deleted meanwhile; give the same command again"
            )

    def read(
        self,
        columns: Sequence[str] | None = None,
        keys: pa.Array | pa.ChunkedArray | None = None,
        *,
        parts: Sequence[str] | None = None,
    ) -> pa.Table:
        """All rows (or those of some keys), each key's from one part; ``parts`` as in ``pieces``."""
        wanted = list(columns if columns is not None else self.schema.names)
        empty = self.readable.empty_table().select(wanted)
        pieces = self.pieces(wanted, self.keys() if keys is None else keys, parts=parts)
        return pa.concat_tables([empty, *(rows.select(wanted) for _, rows in pieces)])


def _as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return table if table.schema.equals(schema) else table.cast(schema)  # a third of the time that reading takes


def _grouped(tables: Iterable[pa.Table], most_rows: int) -> Iterator[list[pa.Table]]:
    """Tables in groups of some size: enough rows that looking up their keys costs little, few enough bytes."""
    group: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        group.append(table)
        rows, size = rows + table.num_rows, size + table.nbytes
        if rows >= most_rows or size >= _PIECE_BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group


def table_parts(uri: str) -> list[str]:
    """URIs of the committed files of a stage table, sorted."""
    return [storage.join(uri, name) for name in storage.list_names(uri) if name.startswith("part-")]


def commit_part(stage: Stage, uri: str, rows: Sequence[Row]) -> pa.Table:
    """Write rows as one file of a stage's table, whole or not at all, under a name derived from their keys.

    Raises:
        OSError: if it cannot be written.
    """
    table = pa.Table.from_pylist(list(rows), schema=stage.schema)
    keys = sorted(set(table[WORK_KEY].to_pylist()))
    name = "part-" + hashlib.sha256("\n".join(keys).encode()).hexdigest()[:24] + ".parquet"
    storage.write_bytes_atomic(storage.join(uri, name), parquet_bytes(table, row_group_rows=stage.row_group_rows))
    return table


def read_columns(uri: str, columns: list[str] | None, rows: tuple[str, Sequence[str]] | None = None) -> pa.Table:
    """Some columns (None: all) of one Parquet file; of a remote one, little else is fetched.

    ``rows`` chooses those with one of some values in a column of text: its name, and the values.
    """
    with storage.open_ranges(uri) as file:
        if rows is None:
            return read_parquet(file, columns)
        return pa.concat_tables(read_parquet_rows(file, *rows, columns))


def read_parts(
    uris: Sequence[str], columns: list[str] | None, rows: tuple[str, Sequence[str]] | None = None
) -> Iterator[pa.Table]:
    """What ``read_columns`` reads of each of many files, in their order; a few ahead at a time."""
    readers = _LOCAL_READERS if all(map(storage.is_local, uris)) else _READERS
    with ThreadPoolExecutor(readers) as pool:
        ahead: deque[Future[pa.Table]] = deque()
        for uri in uris:
            ahead.append(pool.submit(read_columns, uri, columns, rows))
            if len(ahead) > readers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def anti_join(inputs: pa.Table, done: pa.Array) -> pa.Table:
    """The inputs whose key is not done."""
    return inputs.filter(pc.invert(contained(inputs[WORK_KEY], done))) if len(done) else inputs
