"""Tables that users bring: CSV, JSONL or Parquet files with some named columns."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from numpy.typing import NDArray

from pipelines import storage
from pipelines.errors import UserError

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
_PIECE = 1 << 14  # rows
T = TypeVar("T", pa.Table, pa.ChunkedArray)


def is_table(uri: str) -> bool:
    """Whether a file is taken for a table, by its name."""
    return uri.lower().endswith(TABLE_SUFFIXES)


def read_table(uri: str, columns: Sequence[str], key: str) -> pa.Table:
    """Some columns of a table, as text.

    Args:
        uri: The file.
        columns: Wanted columns.
        key: Config key that named the file, for messages.

    Raises:
        UserError: if it is missing, unreadable, of another kind, or lacks a column.
    """
    if not is_table(uri):
        raise UserError(f"{key} {uri} is no table; name a file that ends in {', '.join(TABLE_SUFFIXES)}")
    try:
        with storage.open_file(uri) as file:
            if uri.lower().endswith(".csv"):
                parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
                types = pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
                )
                table = pyarrow.csv.read_csv(file, parse_options=parse, convert_options=types)
            elif uri.lower().endswith(".jsonl"):
                table = pyarrow.json.read_json(file)
            else:
                table = pyarrow.parquet.read_table(file)
    except FileNotFoundError as error:
        raise UserError(f"{key} {uri} does not exist; check the path") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{key} {uri} cannot be read as a table: {error}") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(
            f"{key} {uri} has no column {', '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, table.column_names))}: "
            "rename its columns, or name them in the config (captions.path_column, captions.caption_column)"
        )
    try:
        return table.select(list(columns)).cast(pa.schema([(name, pa.string()) for name in columns]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{key} {uri}: columns {', '.join(columns)} must hold text ({error})") from error


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


def sort(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Rows in ascending order of some columns."""
    keys = [(name, "ascending") for name in columns]
    return take(table, pc.sort_indices(table, sort_keys=keys).to_numpy().astype(np.int64))


def resolve_paths(table_uri: str, paths: Sequence[str]) -> list[str]:
    """URIs of the paths in a table: absolute ones as they are, others relative to the table's folder."""
    local = storage.is_local(table_uri)
    folder = os.path.dirname(storage.filesystem(table_uri)[1]) if local else table_uri.rpartition("/")[0]
    resolved = []
    for path in paths:
        if "://" in path:
            resolved.append(path)
        elif os.path.isabs(path):
            resolved.append(os.path.normpath(path))
        else:
            resolved.append(os.path.normpath(os.path.join(folder, path)) if local else storage.join(folder, path))
    return resolved
