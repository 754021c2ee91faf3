"""Parquet files, read by the calling thread alone.

Where pyarrow's own threads read a file of Python's, one of them may let go of a piece of it when the answer is long
there. If Python ends just then, the whole process is aborted ("terminate called without an active exception").
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def open_parquet(source: Any, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A Parquet file of which no thread fetches ahead; read it with ``use_threads=False``.

    Raises:
        pyarrow.ArrowInvalid: if it is no Parquet file.
    """
    return pq.ParquetFile(source, metadata=metadata, pre_buffer=False)


def read_parquet(source: BinaryIO | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Some columns (None: all) of a Parquet file.

    Raises:
        pyarrow.ArrowInvalid: if it is no Parquet file, or is damaged.
    """
    with open_parquet(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)


def read_parquet_rows(
    source: BinaryIO, column: str, values: Iterable[str], columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of a Parquet file whose text in ``column`` is one of the values, by row group.

    Of row groups without such rows, ``column`` alone is read. The first table is empty, and tells the types.
    """
    wanted = pa.array(values, pa.string())
    with open_parquet(source) as file:
        schema = file.schema_arrow
        names = schema.names if columns is None else list(columns)
        yield pa.schema([schema.field(name) for name in names]).empty_table()
        for group in range(file.num_row_groups):
            chosen = pc.is_in(file.read_row_group(group, [column], use_threads=False)[column], value_set=wanted)
            if pc.any(chosen).as_py():
                yield file.read_row_group(group, names, use_threads=False).select(names).filter(chosen)
