"""Sources: what a folder, a glob or a table of paths names, and the content hash of each file."""

import glob
import os
import stat
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.data.config import CurateConfig
from pipelines.data.keys import file_key
from pipelines.data.settings import SourceConfig
from pipelines.data.snapshot.removals import read_removed
from pipelines.data.stage.stage import WORK, Row, Stage, StageResources
from pipelines.data.steps.run import Run, Step, read_in_order
from pipelines.data.steps.user_tables import TABLE_SUFFIXES, is_table, read_table, resolve_paths
from pipelines.data.video.reader import VideoError, unreadable_error
from pipelines.errors import UserError
from pipelines.storage import s3

# One row per file that was named; ``path`` is relative to what was named, so it does not tell where the work is done.
LISTING = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)
HASHED = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("source_id", pa.string()),
        pa.field("error", pa.string()),
    ]
)
_PIECE = 1 << 16  # rows of a table that are described at a time


def list_sources(config: SourceConfig) -> pa.Table:
    """Every file that a source config names, sorted by path; nothing is opened.

    Raises:
        UserError: if there is nothing of that name, no video in it, or the table lacks its column.
    """
    path = config.path
    s3.check_store(path)
    if storage.is_dir(path):
        found = _table(storage.list_files(path, suffixes=config.extensions))
        missing = f"no video files under {path}; looked for *{', *'.join(config.extensions)}"
    elif is_table(path) and storage.exists(path):
        found = _list_table(path)
        missing = f"source.path {path} has no rows"
    elif storage.exists(path):
        found = _table([storage.describe_file(_absolute(path), os.path.basename(path))])
        missing = ""
    elif glob.has_magic(path):
        found = _table(_list_glob(path))
        missing = f"no file matches source.path {path}"
    else:
        raise UserError(
            f"source.path {path} does not exist; name a folder, a glob, a video, or a table of paths "
            f"({', '.join(TABLE_SUFFIXES)})"
        )
    if not found.num_rows:
        raise UserError(f"{missing}; check source.path and source.extensions")
    return found


def source_folder(path: str) -> str:
    """The folder that a source path is in, or is: of a glob, the one above its first wildcard."""
    if storage.is_dir(path):
        return path
    if glob.has_magic(path) and not storage.exists(path):
        return _above_wildcard(path) or ("/" if path.startswith("/") else ".")
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def _above_wildcard(pattern: str) -> str:
    parts = pattern.split("/")
    return "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])


def _table(files: Sequence[storage.FileInfo]) -> pa.Table:
    rows = {
        "work_key": [file_key(file) for file in files],
        "path": [file.path for file in files],
        "uri": [file.uri for file in files],
        "size": [file.size for file in files],
    }
    return pa.table(rows, schema=LISTING)


def _absolute(path: str) -> str:
    return os.path.abspath(path) if storage.is_local(path) else path


def _list_table(path: str) -> pa.Table:
    """A table of millions of rows is taken in pieces, as its names weigh several times more as Python's objects."""
    names = pc.unique(read_table(path, ["path"], "source.path")["path"])
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
        base = os.path.abspath(fixed or ("/" if pattern.startswith("/") else "."))
        names = {os.path.abspath(name) for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name)}
        return [storage.describe_file(name, os.path.relpath(name, base)) for name in sorted(names)]
    fs, remote = storage.filesystem(pattern)
    _, base = storage.filesystem(fixed)
    matches = fs.glob(remote, detail=True)
    found = [(name, detail) for name, detail in sorted(matches.items()) if detail["type"] == "file"]
    relative = [name.removeprefix(base).lstrip("/") for name, _ in found]
    return [
        storage.FileInfo(path=name, uri=storage.join(fixed, name), size=int(detail["size"] or 0), version=_tag(detail))
        for name, (_, detail) in zip(relative, found, strict=True)
    ]


def _tag(detail: dict[str, Any]) -> str:
    return str(detail.get("ETag") or detail.get("LastModified") or "")


class HashFunction:
    """Content hashes of files."""

    def __init__(self, uri: str) -> None:
        del uri  # nothing is recorded beside the table

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """The content hash of each file, or why it cannot be read."""
        return [{"work_key": row["work_key"], **hash_file(row["uri"])} for row in rows]


def hash_file(uri: str) -> dict[str, str | None]:
    """``source_id`` of one file, or ``error``."""
    try:
        if storage.is_local(uri) and not stat.S_ISREG(os.stat(storage.filesystem(uri)[1]).st_mode):
            # A pipe or a device may never end.
            error = VideoError("not_a_video", "a folder, a pipe or a device")
            return {"source_id": None, "error": error.reason}
        return {"source_id": storage.sha256_file(uri), "error": None}
    except OSError as error:
        return {"source_id": None, "error": unreadable_error(error).reason}


def sources_stage(resources: StageResources) -> Stage:
    """The stage that hashes files."""
    return Stage(
        name="sources",
        settings={"version": 1, "hash": "sha256"},
        schema=HASHED,
        function=HashFunction,
        rows_per_part=2048,
        min_rows_per_part=256,
        resources=resources,
        stateful=False,
    )


def first_paths(sources: pa.Table) -> pa.Table:
    """One row per content: of the files with equal content the one with the lowest path.

    Args:
        sources: The listing joined with its hashes.
    """
    readable = sources.filter(pc.is_valid(sources["source_id"])).sort_by(
        [("source_id", "ascending"), ("path", "ascending")]
    )
    ids = readable["source_id"].combine_chunks()
    if len(ids) < 2:
        return readable
    new = pc.fill_null(pc.not_equal(ids[1:], ids[:-1]), True)
    return readable.filter(pa.concat_arrays([pa.array([True]), new]))


class HashSources(Step):
    """Gives each file its content hash, or why it has none; leaves out what was removed from the dataset."""

    def __init__(self, config: CurateConfig) -> None:
        self.stages = (sources_stage(config.resources.of("sources")),)

    def apply(self, run: Run) -> None:
        """Hash what is new, and find what stands for each content."""
        listing = run.listing
        keys = pc.unique(listing["work_key"])  # a file may be listed under several names
        files = listing.take(pc.index_in(keys, listing["work_key"].combine_chunks()))
        work = pc.max_element_wise(files["size"], 0).cast(pa.float64())
        table = run.compute("sources", files.append_column(WORK, work))
        hashed = read_in_order(table, ["source_id", "error"], files["work_key"])
        places = pc.index_in(listing["work_key"], keys)
        for name in ("source_id", "error"):
            listing = listing.append_column(name, hashed[name].take(places))
        flags = pc.is_in(listing["source_id"], pa.array(read_removed(run.config.dataset), pa.string()))
        run.sources, run.removed = listing.filter(pc.invert(flags)), listing.filter(flags)
        run.first = first_paths(run.sources)
