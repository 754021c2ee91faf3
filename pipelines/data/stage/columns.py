"""Columns of Arrow tables: taken, sorted, hashed and walked through in pieces, and written as Parquet."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.memory import give_back_free_memory

_PIECE = 1 << 14  # rows
T = TypeVar("T", pa.Table, pa.ChunkedArray)
Column: TypeAlias = pa.Array | pa.ChunkedArray


def iterate(column: pa.ChunkedArray) -> Iterator[Any]:
    """The values of a column as Python's objects, which weigh several times more, a piece at a time."""
    for start in range(0, len(column), _PIECE):
        yield from column.slice(start, _PIECE).to_pylist()


def take(data: T, places: NDArray[np.int64]) -> T:
    """Rows of a table or a column of several chunks, in the order of their places.

    As Arrow's own ``take``, which puts all chunks together first: that is slow for a few rows of very many, and fails
    where a column holds 2 GiB of text.
    """
    if isinstance(data, pa.Table):
        columns = [take(column, places) for column in data.columns]
        return pa.Table.from_arrays(columns, schema=data.schema)
    ends = np.cumsum([len(chunk) for chunk in data.chunks], dtype=np.int64)
    pieces = []
    for start in range(0, len(places), _PIECE):
        own = places[start : start + _PIECE]
        chunk_of = np.searchsorted(ends, own, side="right")
        by_chunk = np.argsort(chunk_of, kind="stable")
        numbers, firsts = np.unique(chunk_of[by_chunk], return_index=True)
        parts = [
            data.chunk(number).take(pa.array(own[rows] - (ends[number - 1] if number else 0)))
            for number, rows in zip(numbers.tolist(), np.split(by_chunk, firsts[1:]), strict=True)
        ]
        pieces.append(pa.concat_arrays(parts).take(pa.array(np.argsort(by_chunk))))
    return pa.chunked_array(pieces, data.type)


def positions(values: Column, among: Column) -> Column:
    """The place of each value among others (the first, if it is there more than once), null where it is not there."""
    return pc.index_in(widened(values), value_set=widened(among))


def contained(values: Column, among: Column) -> Column:
    """Which values are among others."""
    return pc.is_in(widened(values), value_set=widened(among))


def first_places(column: Column) -> NDArray[np.int64]:
    """The first place of each value that a column holds, ascending."""
    wide = widened(column)
    return np.asarray(pc.index_in(pc.unique(wide), value_set=wide), np.int64)


def widened(column: Column) -> Column:
    """Text of a type of which there may be more than 2 GiB together, as keys of very many clips are; nothing is copied.

    Arrow puts the values of a column together where it looks others up in it or counts them.
    """
    return column.cast(pa.large_string()) if pa.types.is_string(column.type) else column


def sort(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Rows in ascending order of some columns."""
    keys = [(name, "ascending") for name in columns]
    return take(table, pc.sort_indices(table, sort_keys=keys).to_numpy().astype(np.int64))


def release_memory() -> None:
    """Give back to the system what Arrow and what else reads files have freed, and would keep."""
    pa.default_memory_pool().release_unused()
    give_back_free_memory()


def parquet_bytes(table: pa.Table, *, row_group_rows: int, **layout: Any) -> bytes:
    """A table as Parquet, the same bytes for the same rows (of one version of pyarrow).

    ``layout`` goes to pyarrow's writer: encodings, statistics.
    """
    sink = io.BytesIO()
    options = {"compression": "zstd", "compression_level": 3, "version": "2.6", "data_page_version": "1.0"}
    pq.write_table(table.combine_chunks(), sink, row_group_size=row_group_rows, **options, **layout)
    return sink.getvalue()


def digest_rows(table: pa.Table) -> str:
    """Hex SHA-256 of the values in a table's columns, in their order, however they lie in memory."""
    digest = hashlib.sha256()
    for field, column in zip(table.schema, table.columns, strict=True):
        digest.update(f"{field.name}: {field.type}, {len(column)}\n".encode())
        for data in _plain_buffers(pa.concat_arrays([*column.chunks, pa.array([], column.type)])):
            digest.update(data)
    return digest.hexdigest()


def _plain_buffers(array: pa.Array) -> Iterator[Any]:
    """Which values are there, and the values: of what may be null, zero stands where it is."""
    yield np.packbits(array.is_valid().to_numpy(zero_copy_only=False))
    if pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _plain_buffers(child)
    elif pa.types.is_list(array.type):
        yield pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        yield from _plain_buffers(array.flatten())
    elif pa.types.is_string(array.type):
        filled = pc.fill_null(array, "")
        yield pc.binary_length(filled).to_numpy()
        _, offsets, text = filled.buffers()
        bounds = np.frombuffer(offsets, np.int32, len(filled) + 1, 4 * filled.offset) if len(filled) else (0, 0)
        yield text[int(bounds[0]) : int(bounds[-1])] if text is not None else b""
    else:
        yield np.ascontiguousarray(pc.fill_null(array, 0).to_numpy())
