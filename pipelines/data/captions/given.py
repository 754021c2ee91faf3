"""Captions that users bring, in a table or in .txt files beside the videos."""

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from operator import itemgetter

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.data.captions.captioner import CAPTIONED, Captioner, CaptionSource, clean_captions
from pipelines.data.config import CurateConfig
from pipelines.data.keys import caption_key
from pipelines.data.settings import CaptionConfig, SourceConfig
from pipelines.data.stage.columns import contained, widened
from pipelines.data.stage.stage import Row, Stage
from pipelines.data.steps.sources import TABLE_SUFFIXES, is_table, read_table, resolve_paths, source_folder
from pipelines.errors import UserError

CAPTION_INPUTS = pa.schema(
    [("work_key", pa.string()), ("key", pa.string()), ("texts", pa.list_(pa.string())), ("captioner", pa.string())]
)


_PIECE = 1 << 14  # clips at a time, as Python's objects weigh several times more


def find_captions(config: CaptionConfig, source: SourceConfig, listing: pa.Table) -> CaptionSource:
    """The captions that a user brings.

    From ``captions.file``; else from a file captions.csv, .jsonl or .parquet in the source folder (of a glob, the one
    above its first wildcard); else from the caption column of the table that names the sources; else from .txt files
    beside the videos.

    Raises:
        UserError: if a table cannot be read, lacks columns, or names none of the videos.
    """
    table = config.file or _table_beside(config, source)
    if table is None:
        return CaptionSource("sidecar", _sidecars(listing))
    key = "captions.file" if config.file else "the captions file"
    columns = read_table(table, [config.path_column, config.caption_column], key)
    texts: dict[str, list[str]] = defaultdict(list)
    paths = columns[config.path_column].to_pylist()
    uris = resolve_paths(table, [path or "" for path in paths])
    for uri, text in zip(uris, columns[config.caption_column].to_pylist(), strict=True):
        if text:
            texts[uri].append(text)
    if paths and texts.keys().isdisjoint(listing["uri"].to_pylist()):
        if not config.file and not storage.is_dir(source.path):
            return CaptionSource("sidecar", _sidecars(listing))
        raise UserError(
            f"{key} {table} has no caption for any of the {listing.num_rows} videos: its {config.path_column!r} "
            f"({paths[0]!r}, ...) must be relative to its folder, or absolute"
        )
    return CaptionSource("metadata", {uri: tuple(found) for uri, found in texts.items()})


def _table_beside(config: CaptionConfig, source: SourceConfig) -> str | None:
    if is_table(source.path) and not storage.is_dir(source.path):
        try:
            read_table(source.path, [config.path_column, config.caption_column], "source.path")
        except UserError:
            return None  # paths alone
        return source.path
    folder = source_folder(source.path)
    names = storage.list_names(folder)
    return next((storage.join(folder, name) for s in TABLE_SUFFIXES if (name := f"captions{s}") in names), None)


def _sidecars(listing: pa.Table) -> dict[str, tuple[str, ...]]:
    """The .txt file beside each video that has one."""
    found: dict[str, tuple[str, ...]] = {}
    names: dict[str, set[str]] = {}  # by folder: one listing instead of a question for each video
    for uri in listing["uri"].to_pylist():
        place = storage.filesystem(uri)[1] if storage.is_local(uri) else uri  # whose name may be escaped
        sidecar = os.path.splitext(place)[0] + ".txt"
        folder, _, name = sidecar.rpartition("/")
        if folder not in names:
            names[folder] = set(storage.list_names(folder))
        if name in names[folder]:
            with suppress(FileNotFoundError):  # a broken link
                found[uri] = (storage.read_bytes(sidecar).decode("utf-8", errors="replace"),)
    return found


def share_captions(source: CaptionSource, files: pa.Table) -> CaptionSource:
    """Give files without captions those of a file with the same content, of several the one with the lowest path.

    Files are ``uri``, ``path`` and ``source_id`` of all.
    """
    counts = pc.value_counts(widened(files["source_id"].drop_null()))
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    copies = files.filter(contained(files["source_id"], several)).select(["source_id", "path", "uri"])
    ordered = copies.sort_by([("source_id", "ascending"), ("path", "ascending")]).to_pylist()
    texts = dict(source.texts)
    for _, group in groupby(ordered, key=itemgetter("source_id")):
        uris = [row["uri"] for row in group]
        shared = next((source.texts[uri] for uri in uris if source.texts.get(uri)), None)
        texts |= {uri: shared for uri in uris if shared and not source.texts.get(uri)}
    return CaptionSource(source.captioner, texts)


def attach_captions(rows: Sequence[Row]) -> list[Row]:
    """Captions of each clip, cleaned."""
    return [
        {"work_key": row["work_key"], "key": row["key"], "captions": clean_captions(row["texts"], row["captioner"])}
        for row in rows
    ]


def given_inputs(clips: pa.Table, source: CaptionSource) -> pa.Table:
    """What the stage is given of clips: the captions of their files."""
    made = [CAPTION_INPUTS.empty_table()]
    for start in range(0, clips.num_rows, _PIECE):
        texts = [source.texts.get(uri, ()) for uri in clips["uri"].slice(start, _PIECE).to_pylist()]
        keys = clips["key"].slice(start, _PIECE).to_pylist()
        columns = {
            "work_key": [caption_key(key, text, source.captioner) for key, text in zip(keys, texts, strict=True)],
            "key": keys,
            "texts": texts,
            "captioner": [source.captioner] * len(keys),
        }
        made.append(pa.table(columns, schema=CAPTION_INPUTS))
    return pa.concat_tables(made)


def captions_stage(config: CurateConfig) -> Stage:
    """The stage that attaches captions."""
    return Stage(
        name="captions",
        settings={"version": 2, "captioner": "given"},
        schema=CAPTIONED,
        function=lambda _: attach_captions,
        rows_per_part=8192,
        min_rows_per_part=4096,
        resources=config.resources.of("captions"),
        stateful=False,
    )


GIVEN = Captioner(name="given", stage_name="captions", stage=captions_stage, reads_looks=False, inputs=given_inputs)
