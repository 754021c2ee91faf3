"""Tables that users bring: CSV, JSONL or Parquet files with some named columns."""

import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from pipelines import storage
from pipelines.errors import UserError

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")


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
