"""Captions that users bring, in a table or in .txt files beside the videos; and which captions are fit to be used."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.data.reasons import other_language, too_few_words, too_many_words
from pipelines.data.settings import CaptionConfig, SourceConfig
from pipelines.data.snapshot.schemas import CAPTIONS
from pipelines.data.stage.stage import Row, Stage, StageResources
from pipelines.data.steps.sources import source_folder
from pipelines.data.steps.user_tables import TABLE_SUFFIXES, is_table, read_table, resolve_paths
from pipelines.errors import UserError

CAPTION_INPUTS = pa.schema(
    [("work_key", pa.string()), ("key", pa.string()), ("texts", pa.list_(pa.string())), ("captioner", pa.string())]
)
CAPTIONED = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("captions", CAPTIONS),
        pa.field("input_tokens", pa.int64()),  # that an endpoint counted, asks money for
        pa.field("output_tokens", pa.int64()),
        pa.field("error", pa.string()),  # why a captioner has none
    ]
)
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class CaptionSource:
    """Raw captions by the URI of their video."""

    captioner: str  # "metadata" or "sidecar"
    texts: dict[str, tuple[str, ...]]


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

    Args:
        source: What each file's own are.
        files: Of all, ``uri``, ``path`` and ``source_id``.
    """
    counts = pc.value_counts(files["source_id"].drop_null())
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    copies = files.filter(pc.is_in(files["source_id"], several)).select(["source_id", "path", "uri"])
    ordered = copies.sort_by([("source_id", "ascending"), ("path", "ascending")]).to_pylist()
    texts = dict(source.texts)
    for _, group in groupby(ordered, key=itemgetter("source_id")):
        uris = [row["uri"] for row in group]
        shared = next((source.texts[uri] for uri in uris if source.texts.get(uri)), None)
        texts |= {uri: shared for uri in uris if shared and not source.texts.get(uri)}
    return CaptionSource(source.captioner, texts)


def clean_captions(texts: Sequence[str], captioner: str) -> list[dict[str, str]]:
    """Captions without stray white space, empty ones and repetitions."""
    cleaned = dict.fromkeys(_SPACE.sub(" ", text).strip() for text in texts)
    return [{"text": text, "captioner": captioner} for text in cleaned if text]


def unique_captions(captions: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The captions in their order, each text once, by whoever said it first."""
    unique: dict[str, dict[str, str]] = {}
    for caption in captions:
        unique.setdefault(caption["text"], caption)
    return list(unique.values())


class CaptionFunction:
    """Cleans the captions of clips."""

    def __init__(self, uri: str) -> None:
        del uri  # nothing is recorded beside the table

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Captions of each clip."""
        return [
            {
                "work_key": row["work_key"],
                "key": row["key"],
                "captions": clean_captions(row["texts"], row["captioner"]),
            }
            for row in rows
        ]


def captions_stage(resources: StageResources) -> Stage:
    """The stage that attaches captions."""
    return Stage(
        name="captions",
        settings={"version": 2, "captioner": "given"},
        schema=CAPTIONED,
        function=CaptionFunction,
        rows_per_part=8192,
        min_rows_per_part=4096,
        resources=resources,
        stateful=False,
    )


def caption_fault(text: str, config: CaptionConfig) -> str | None:
    """Why a caption is not to be used, such as "words 2 < 3" or "language de"; None if it is."""
    words = len(text.split())
    if config.min_words is not None and words < config.min_words:
        return too_few_words(words, config.min_words)
    if config.max_words is not None and words > config.max_words:
        return too_many_words(words, config.max_words)
    if config.languages:
        language, certainty = _language_identifier().classify(text)
        if language not in config.languages and certainty >= config.language_certainty:
            return other_language(language)
    return None


@lru_cache(maxsize=1)
def _language_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
