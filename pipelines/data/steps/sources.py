"""Sources: what a folder, a glob or a table of paths names, and the content hash of each file; tables of users."""

import csv
import glob
import io
import math
import os
import stat
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from pipelines import storage
from pipelines.data.config import CurateConfig
from pipelines.data.keys import file_key
from pipelines.data.reasons import reason_of
from pipelines.data.settings import TABLE_SUFFIXES as TABLE_SUFFIXES  # at hand here too
from pipelines.data.settings import SourceConfig
from pipelines.data.snapshot.removals import read_removed
from pipelines.data.stage.columns import first_places, positions, sort, take
from pipelines.data.stage.stage import WORK, Row, Stage
from pipelines.data.steps.run import Run, Step, read_in_order
from pipelines.decoding.errors import VideoError, unreadable_error
from pipelines.errors import UserError
from pipelines.parquet import read_parquet
from pipelines.storage import http, s3

# One row per file that was named; ``path`` is relative to what was named, so it does not tell where the work is done.
LISTING = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)
HASHED = pa.schema([LISTING.field("work_key"), ("source_id", pa.string()), ("error", pa.string())])
_PIECE = 1 << 16  # rows of a table that are described at a time


def list_sources(config: SourceConfig) -> pa.Table:
    """Every file that a source config names, sorted by path; nothing is opened.

    Raises:
        UserError: if there is nothing of that name, no video in it, or the table lacks its column.
    """
    path = config.path
    s3.check_store(path)
    http.check_server(path)
    if storage.is_dir(path):
        found = _table(storage.list_files(path, suffixes=config.extensions))
        missing = f"no video files under {path}; looked for *{', *'.join(config.extensions)}"
    elif is_table(path) and storage.exists(path):
        found = _list_table(path)
        missing = f"source.path {path} has no rows"
    elif storage.exists(path):
        absolute = os.path.abspath(path) if storage.is_local(path) else path
        found = _table([storage.describe_file(absolute, os.path.basename(path))])
        missing = ""
    elif glob.has_magic(path):
        found = _table(_list_glob(path))
        missing = f"no file matches source.path {path}"
    else:
        raise config.is_missing()
    if not found.num_rows:
        raise UserError(f"{missing}; check source.path and source.extensions")
    return found


def source_folder(path: str) -> str:
    """The folder that a source path is in, or is: of a glob, the one above its first wildcard."""
    if storage.is_dir(path):
        return path
    if glob.has_magic(path) and not storage.exists(path):
        return _above_wildcard(path)
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def _above_wildcard(pattern: str) -> str:
    parts = pattern.split("/")
    fixed = parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))]
    return "/".join(fixed) or ("/" if pattern.startswith("/") else ".")


def _table(files: Sequence[storage.FileInfo]) -> pa.Table:
    rows = {
        "work_key": [file_key(file) for file in files],
        "path": [file.path for file in files],
        "uri": [file.uri for file in files],
        "size": [file.size for file in files],
    }
    return pa.table(rows, schema=LISTING)


def _list_table(path: str) -> pa.Table:
    """A table of millions of rows is taken in pieces, as its names weigh several times more as Python's objects."""
    every = read_table(path, ["path"], "source.path")["path"]
    names = take(every, first_places(every))
    names = names.filter(pc.fill_null(pc.not_equal(names, ""), False))
    pieces = [LISTING.empty_table()]
    for start in range(0, len(names), _PIECE):
        piece = names.slice(start, _PIECE).to_pylist()
        uris = resolve_paths(path, piece)
        pieces.append(_table([storage.describe_file(uri, name) for name, uri in zip(piece, uris, strict=True)]))
    return pa.concat_tables(pieces)


def _list_glob(pattern: str) -> list[storage.FileInfo]:
    """Paths are relative to the folder above the pattern's first wildcard."""
    fixed = _above_wildcard(pattern)
    if storage.is_local(pattern):
        base = os.path.abspath(fixed)
        names = {os.path.abspath(name) for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name)}
        return [storage.describe_file(name, os.path.relpath(name, base)) for name in sorted(names)]
    fs, remote = storage.filesystem(pattern)
    _, base = storage.filesystem(fixed)
    found = []
    for full, detail in sorted(fs.glob(remote, detail=True).items()):
        if detail["type"] == "file":
            path = full.removeprefix(base).lstrip("/")
            size, version = int(detail["size"] or 0), str(detail.get("ETag") or detail.get("LastModified") or "")
            found.append(storage.FileInfo(path=path, uri=storage.join(fixed, path), size=size, version=version))
    return found


def is_table(uri: str) -> bool:
    """Whether a file is taken for a table, by its name."""
    return uri.lower().endswith(TABLE_SUFFIXES)


def read_table(uri: str, columns: Sequence[str], key: str, *, optional: Sequence[str] = ()) -> pa.Table:
    """Some columns of a table, as text, and of ``optional`` those that it has; messages tell the key that named it.

    Raises:
        UserError: if it is missing, unreadable, of another kind, or lacks a column.
    """
    if not is_table(uri):
        raise UserError(f"{key} {uri} is no table; name a file that ends in {', '.join(TABLE_SUFFIXES)}")
    try:
        with storage.local_copy(uri) as path:
            if uri.lower().endswith(".csv"):
                parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
                texts = dict.fromkeys([*columns, *optional], pa.string())
                types = pyarrow.csv.ConvertOptions(column_types=texts, strings_can_be_null=False)
                table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=types)
            elif uri.lower().endswith(".jsonl"):
                table = pyarrow.json.read_json(path)
            else:
                with open(path, "rb") as file:
                    table = read_parquet(file)
    except FileNotFoundError as error:
        raise UserError(f"{key} {uri} does not exist; check the path") from error
    except (pa.ArrowInvalid, OSError) as error:
        line = _bad_line(uri) if uri.lower().endswith(".csv") and isinstance(error, pa.ArrowInvalid) else None
        where = f", line {line}," if line else ""
        raise UserError(f"{key} {uri}{where} cannot be read as a table: {error}") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(
            f"{key} {uri} has no column {', '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, table.column_names))}: "
            "rename its columns"
            + (", or name them in the config (captions.path_column, captions.caption_column)" * ("caption" in key))
        )
    columns = [*columns, *(name for name in optional if name in table.column_names)]
    try:
        return table.select(list(columns)).cast(pa.schema([(name, pa.string()) for name in columns]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{key} {uri}: columns {', '.join(columns)} must hold text ({error})") from error


def _bad_line(uri: str) -> int | None:
    """The line of a CSV file on which a row begins that has another number of columns than the head, or no text."""
    with storage.open_file(uri) as file, io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="") as text:
        reader = csv.reader(text)
        head, last = next(reader, []), reader.line_num
        for row in reader:
            undecoded = any("\udc80" <= letter <= "\udcff" for letter in "".join(row))
            if undecoded or (row and len(row) != len(head)):
                return last + 1
            last = reader.line_num
    return None


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


def hash_files(rows: Sequence[Row]) -> list[Row]:
    """The content hash of each file, or why it cannot be read."""
    return [{"work_key": row["work_key"], **hash_file(row["uri"])} for row in rows]


def hash_file(uri: str) -> dict[str, str | None]:
    """``source_id`` of one file, or ``error``."""
    try:
        if storage.is_local(uri) and not stat.S_ISREG(os.stat(storage.filesystem(uri)[1]).st_mode):
            # A pipe or a device may never end.
            error = VideoError("not_a_video", "a folder, a pipe or a device")
            return {"source_id": None, "error": reason_of(error)}
        return {"source_id": storage.sha256_file(uri), "error": None}
    except OSError as error:
        return {"source_id": None, "error": reason_of(unreadable_error(error))}


def first_paths(sources: pa.Table) -> pa.Table:
    """One row per content of the listing joined with its hashes: of equal files the one with the lowest path."""
    readable = sort(sources.filter(pc.is_valid(sources["source_id"])), ["source_id", "path"])
    return take(readable, first_places(readable["source_id"]))


class HashSources(Step):
    """Gives each file its content hash, or why it has none; leaves out what was removed from the dataset."""

    def __init__(self, config: CurateConfig) -> None:
        stage = Stage(
            name="sources",
            settings={"version": 1, "hash": "sha256"},
            schema=HASHED,
            function=lambda _: hash_files,
            rows_per_part=2048,
            min_rows_per_part=256,
            resources=config.resources.of("sources"),
            stateful=False,
        )
        self.stages = (stage,)

    def apply(self, run: Run) -> None:
        """Hash what is new, and find what stands for each content."""
        listing = run.listing
        files = take(listing, first_places(listing["work_key"]))  # a file may be listed under several names
        work = pc.max_element_wise(files["size"], 0).cast(pa.float64())
        # What cannot be read counts in the split stage.
        table = run.compute("sources", files.append_column(WORK, work), total=math.inf)
        hashed = read_in_order(table, ["source_id", "error"], files["work_key"])
        places = positions(listing["work_key"], files["work_key"]).to_numpy()
        for name in ("source_id", "error"):
            listing = listing.append_column(name, take(hashed[name], places))
        flags = pc.is_in(listing["source_id"], pa.array(read_removed(run.config.dataset), pa.string()))
        run.sources, run.removed = listing.filter(pc.invert(flags)), listing.filter(flags)
        run.first = first_paths(run.sources)
