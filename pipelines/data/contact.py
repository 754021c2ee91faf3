"""Contact sheets: frames of some clips of every fate, so that one sees what the scores and thresholds do.

The clips are chosen from the ledger alone; stills.py decodes their frames. A clip that cannot be shown gets a tile that
says why, and never keeps the page from being written.
"""

import base64
import html
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import storage
from pipelines.data.runner import Row, read_parts
from pipelines.data.schemas import STATUSES
from pipelines.data.snapshot import Snapshot
from pipelines.data.stills import MOMENTS, Shown, decode_frames
from pipelines.data.video import VideoError

IDENTITY = ("key", "source_id")  # columns of the ledger that only contact sheets take
CLIPS_EACH = 12  # shown of every fate
_PATH_CHARACTERS = 64  # of a path that are shown
_CAPTION_CHARACTERS = 160
_HASH_ROWS = 1 << 16  # hashed at a time
_HASH_FACTOR = 0x9E3779B97F4A7C15  # odd, of evenly strewn bits

# What reasons name: "dark_share 0.6273 > 0.5", "near: of KEY (cosine 0.998)", "exact: of SOURCE_ID".
_SCORE = re.compile(r"(?:^|; )(\w+ [-+.\w]+) [<>] |\((cosine .+)\)$")
_NEAR = re.compile(r"near: of (\S+) ")
_EXACT = re.compile(r"exact: of (\S+)")


@dataclass(frozen=True)
class Sheet:
    """Some clips of one fate, and how many there are."""

    status: str
    reason: str  # its class
    rows: list[Row]  # of the ledger
    total: int


def contact_sheets(snapshot: Snapshot, ledger: pa.Table) -> str:
    """The page's section of contact sheets, as HTML.

    Args:
        snapshot: Whose clips; the stage tables and sources it was made from are looked for, not relied upon.
        ledger: Its ledger (no scores are needed), with a column ``class``: that of each row's reason.
    """
    sheets = choose_clips(ledger)
    chosen = [row for rank in zip_longest(*(sheet.rows for sheet in sheets)) for row in rank if row is not None]
    originals, contents = _originals(ledger, chosen), _contents(ledger, chosen)
    clips = {row["key"]: row for row in chain(chosen, originals.values()) if row["end_s"] is not None}
    shown = decode_frames(snapshot, list(clips.values()))
    captions = _captions(snapshot, [row["key"] for row in clips.values() if row["status"] == "kept"])

    def tiles(row: Row) -> str:
        original = originals.get(_named(_NEAR, row))
        if original is None:
            content = contents.get(_named(_EXACT, row))
            seen = f"the same content as {content}" if content else shown.get(row["key"])
            return _tile(row, seen, caption=captions.get(row["key"], ""))
        caption, note = captions.get(original["key"], ""), f"the original, {original['status']}"
        second = _tile(original, shown.get(original["key"]), note=note, caption=caption)
        return f'<div class="pair">{_tile(row, shown.get(row["key"]))}{second}</div>'

    parts = [
        '<section class="contact">',
        "<h2>What the clips look like</h2>",
        f"<p>Start, middle and end of up to {CLIPS_EACH} clips of every fate, drawn by a hash of their keys and spread "
        "over the sources. Point at one to read its full reason.</p>",
    ]
    for sheet in sheets:
        title = html.escape(f"{sheet.status}: {sheet.reason}" if sheet.reason else sheet.status)
        parts.append(f"<h3>{title} <i>{len(sheet.rows)} of {sheet.total}</i></h3>")
        parts.append(f'<div class="sheet">{"".join(map(tiles, sheet.rows))}</div>')
    return "\n".join([*parts, "</section>"])


def choose_clips(ledger: pa.Table, each: int = CLIPS_EACH) -> list[Sheet]:
    """Some rows of every fate: of as many sources as can be, and of those the ones whose keys have the lowest hashes.

    So the choice is the same whenever the ledger is, and changes little when sources are added.
    """
    names = pc.binary_join_element_wise(ledger["status"], ledger["class"], "\n")
    fates = names.dictionary_encode().unify_dictionaries().combine_chunks()
    codes, hashes, sources = fates.indices.to_numpy(), hash_strings(ledger["key"]), hash_strings(ledger["path"])
    by_source = np.lexsort((hashes, sources, codes))
    turns = np.empty(len(codes), np.int64)  # of a clip among those of its fate and source
    turns[by_source] = _count_up((codes[by_source], sources[by_source]))
    by_turn = np.lexsort((hashes, turns, codes))
    order = by_turn[_count_up((codes[by_turn],)) < each]
    rows = ledger.take(pa.array(order)).to_pylist()
    totals = np.bincount(codes)
    sheets = []
    for code, name in enumerate(fates.dictionary.to_pylist()):
        status, _, reason = name.partition("\n")
        own = [row for row, other in zip(rows, codes[order], strict=True) if other == code]
        sheets.append(Sheet(status, reason, own, int(totals[code])))
    return sorted(sheets, key=lambda sheet: (STATUSES.index(sheet.status), -sheet.total, sheet.reason))


def _count_up(columns: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """0, 1, 2... within each run of rows that are equal in all columns."""
    places = np.arange(len(columns[0]))
    new = np.ones(len(places), dtype=bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return places - np.maximum.accumulate(np.where(new, places, 0))


def hash_strings(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A hash of each string, which depends on nothing else: a polynomial of its bytes, well mixed."""
    found = [np.zeros(0, np.uint64)]
    for begin in range(0, len(column), _HASH_ROWS):
        part = column.slice(begin, _HASH_ROWS).combine_chunks().cast(pa.large_string())
        _, offsets, data = part.buffers()
        edges = np.frombuffer(offsets, np.int64)[part.offset : part.offset + len(part) + 1]
        letters = np.frombuffer(data or b"", np.uint8)[edges[0] : edges[-1]]
        lengths = np.diff(edges)
        powers = np.full(int(lengths.max()), _HASH_FACTOR, np.uint64).cumprod(dtype=np.uint64)
        terms = powers[np.arange(len(letters)) - np.repeat(edges[:-1] - edges[0], lengths)] * (letters + np.uint64(1))
        sums = np.concatenate([np.zeros(1, np.uint64), terms.cumsum(dtype=np.uint64)])
        found.append(sums[edges[1:] - edges[0]] - sums[edges[:-1] - edges[0]])
    mixed = np.concatenate(found)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # those of SplitMix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed


def _originals(ledger: pa.Table, rows: Sequence[Row]) -> dict[str | None, Row]:
    """Ledger rows of the clips that some rows are near-duplicates of, by key."""
    keys = pa.array({_named(_NEAR, row) for row in rows} - {None}, pa.string())
    return {row["key"]: row for row in ledger.filter(pc.is_in(ledger["key"], keys)).to_pylist()}


def _contents(ledger: pa.Table, rows: Sequence[Row]) -> dict[str | None, str]:
    """Paths that stand for the contents which some rows have too, by source_id."""
    ids = pa.array({_named(_EXACT, row) for row in rows} - {None}, pa.string())
    same = ledger.filter(pc.is_in(ledger["source_id"], ids))
    stands = pc.invert(pc.match_substring(same["key"], "@"))  # in whose rows the key is no path
    return {row["source_id"]: row["path"] for row in same.filter(stands).to_pylist()}


def _captions(snapshot: Snapshot, keys: Sequence[str]) -> dict[str, str]:
    """The first caption of each of these kept clips that has one."""
    wanted, found = pa.array(keys, pa.string()), dict[str, str]()
    shards = [shard.path for bucket in snapshot.manifest.buckets for shard in bucket.shards]
    with suppress(OSError, pa.ArrowException):  # of a damaged snapshot, what can be read
        for table in read_parts([storage.join(snapshot.uri, path) for path in shards], ["clip_id", "captions"]):
            for row in table.filter(pc.is_in(table["clip_id"], wanted)).to_pylist():
                if row["captions"]:
                    found[row["clip_id"]] = row["captions"][0]["text"]
    return found


def _named(pattern: re.Pattern[str], row: Row) -> str | None:
    """What a row's reason says that it is a duplicate of."""
    match = pattern.match(row["reason"])
    return match[1] if match else None


def _tile(row: Row, shown: Shown | str | None, note: str = "", caption: str = "") -> str:
    """Frames or words, and below them the path, the span, the scores that the reason names, and what is said of it."""
    reason = row["reason"] or row["status"]
    is_image = row["end_s"] is not None and row["end_s"] == row["start_s"]
    if isinstance(shown, list):
        images = zip(("image",) if is_image else MOMENTS, shown, strict=False)
        inner = '<div class="strip">' + "".join(_image(*image) for image in images) + "</div>"
    else:
        words = f"no frames, {shown.code.replace('_', ' ')}: {shown.detail}" if isinstance(shown, VideoError) else shown
        inner = f'<p class="words">{html.escape(words or reason)}</p>'
    span = "" if row["end_s"] is None else "image" if is_image else f"{row['start_s']:.1f} to {row['end_s']:.1f} s"
    scores = ", ".join(match[1] or match[2] for match in _SCORE.finditer(reason))
    below = "".join(f"<span>{html.escape(text)}</span>" for text in (span, scores, note) if text)
    below += f"<q>{html.escape(shorten(caption, _CAPTION_CHARACTERS))}</q>" if caption else ""
    title = html.escape("\n".join(filter(None, (row["path"], reason, caption))))
    path = html.escape(shorten(row["path"], _PATH_CHARACTERS))
    return f'<figure title="{title}">{inner}<figcaption><code>{path}</code>{below}</figcaption></figure>'


def _image(moment: str, data: bytes) -> str:
    return f'<img alt="{moment}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'


def shorten(text: str, length: int) -> str:
    """A text without its middle, if it is longer than so many characters."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"
