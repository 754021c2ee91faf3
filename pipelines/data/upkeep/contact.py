"""Contact sheets: frames of some clips of every fate, so that one sees what the scores and thresholds do.

The clips are chosen from the ledger alone; who has frames of them is asked once. A clip that cannot be shown gets a
tile that says why, and never keeps the page from being written.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import storage
from pipelines.data.keys import are_ledger_files
from pipelines.data.reasons import originals_of, parse_duplicate, with_names
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.snapshot.schemas import STATUSES
from pipelines.data.stage.stage import Row
from pipelines.data.stage.table import read_parts
from pipelines.data.upkeep.borderline import Border
from pipelines.data.upkeep.stills import Shown
from pipelines.decoding.errors import VideoError

IDENTITY = ("key", "source_id")  # columns of the ledger that only contact sheets take
CLIPS_EACH = 12  # shown of every fate
MAX_DECODED = 48  # clips whose codes are shown
_HASH_ROWS = 1 << 16  # hashed at a time

# Frames of some clips of a snapshot (ledger rows with a span), by key.
FramesOf = Callable[[Snapshot, Sequence[Row]], Mapping[str, Shown]]


@dataclass(frozen=True)
class Tile:
    """What is shown of a clip or source."""

    row: Row  # of the ledger
    frames: Sequence[bytes]  # JPEG files in the order of time; none where there are words instead
    words: str  # why there are no frames
    note: str = ""  # what else is said of it
    caption: str = ""  # of a kept clip
    decoded: Sequence[bytes] = ()  # JPEG files of what its codes show at the same moments
    psnr: float | None = None  # dB of its codes
    ssim: float | None = None  # likewise
    video: bytes = b""  # an mp4 of its source and codes side by side; empty where there is none

    @property
    def key(self) -> str:
        """By which a person may decide about it; empty for a file that has no clips."""
        return str(self.row["key"]) if self.row["end_s"] is not None else ""


@dataclass(frozen=True)
class Sheet:
    """Some clips of one fate, and how many there are."""

    status: str
    reason: str  # its class
    rows: list[Row]  # of the ledger
    total: int
    near: str = ""  # the threshold to which they are the nearest; else they were drawn
    worst: bool = False  # whether they are those of the lowest PSNR, and ``total`` counts what was measured


@dataclass(frozen=True)
class Worst:
    """Kept clips of the lowest PSNR, the lowest first, by key: their PSNR (dB), and SSIM where it was measured."""

    clips: Mapping[str, tuple[float, float | None]]
    measured: int  # clips


@dataclass(frozen=True)
class Decoded:
    """What is shown of a clip's codes, beside its source."""

    source: Sequence[bytes]  # JPEG files of the moments; none where the source cannot be had
    codes: Sequence[bytes]
    psnr: float | None
    video: bytes = b""  # as ``Tile`` has it


# What codes of some kept clips show, by key.
CodesOf = Callable[[Snapshot, Sequence[str]], Mapping[str, Decoded]]


def contact_sheets(
    snapshot: Snapshot,
    ledger: pa.Table,
    frames_of: FramesOf,
    *,
    borders: Sequence[Border] = (),
    worst: Worst | None = None,
    codes_of: CodesOf | None = None,
) -> list[tuple[Sheet, list[list[Tile]]]]:
    """Sheets, each with a tile for every row, or two: a near-duplicate stands beside its original.

    Args:
        snapshot: Whose clips.
        ledger: Without scores, but with a column ``class``: that of each row's reason.
        frames_of: Asked once for the frames of all clips.
        borders: Clips around thresholds, which stand in place of those drawn of what a threshold rejects.
        worst: Clips that their codes show worst, to be shown before all others.
        codes_of: Asked for what the codes of kept clips show, of the first ``MAX_DECODED``.
    """
    drawn = choose_clips(ledger)
    instead = {border.score for border in borders}
    drawn = [sheet for sheet in drawn if sheet.status != "rejected" or sheet.reason not in instead]
    around = _border_sheets(ledger, borders)
    sheets = [*(s for s in drawn if s.status == "kept"), *around, *(s for s in drawn if s.status != "kept")]
    scores = worst.clips if worst else {}
    if worst and worst.clips:
        rows = {
            row["key"]: row
            for row in ledger.filter(pc.is_in(ledger["key"], pa.array(list(worst.clips), pa.string()))).to_pylist()
        }
        sheets.insert(0, Sheet("kept", "", [rows[key] for key in worst.clips], worst.measured, worst=True))
    chosen = [row for rank in zip_longest(*(sheet.rows for sheet in sheets)) for row in rank if row is not None]
    originals = _originals(ledger, chosen)
    alike = [row for (kind, _), row in originals.items() if kind == "near"]
    clips = {row["key"]: row for row in [*chosen, *alike] if row["end_s"] is not None}
    shown = frames_of(snapshot, list(clips.values()))
    captions = _captions(snapshot, [row["key"] for row in clips.values() if row["status"] == "kept"])
    kept = [row["key"] for sheet in sheets for row in sheet.rows if row["status"] == "kept"]
    decoded = codes_of(snapshot, list(dict.fromkeys(kept))[:MAX_DECODED]) if codes_of is not None else {}
    names = name_originals(ledger, [row["reason"] for row in clips.values()])

    def tile(row: Row, words: str, note: str = "") -> Tile:
        frames = shown.get(row["key"], [])
        caption, codes = captions.get(row["key"], ""), decoded.get(row["key"], Decoded((), (), None))
        row = row | {"reason": with_names(row["reason"], names)}
        if isinstance(frames, VideoError):
            words, frames = f"no frames, {frames.code.replace('_', ' ')}: {frames.detail}", []
        psnr, ssim = scores.get(row["key"], (codes.psnr, None))
        return Tile(row, codes.source or frames, words, note, caption, codes.codes, psnr, ssim, codes.video)

    def tiles(row: Row) -> list[Tile]:
        kind, name = parse_duplicate(row["reason"]) or ("", "")
        original = originals.get((kind, name))
        if original is None:
            return [tile(row, row["reason"])]
        if kind == "exact":
            return [tile(row, f"the same content as {original['path']}")]
        return [tile(row, row["reason"]), tile(original, original["reason"], f"the original, {original['status']}")]

    return [(sheet, list(map(tiles, sheet.rows))) for sheet in sheets]


def tiles_of(snapshot: Snapshot, rows: Sequence[Row], frames_of: FramesOf, names: Mapping[str, str]) -> dict[str, Tile]:
    """A tile of each of some clips, by key; ``names`` are those of the originals that their reasons name."""
    shown = frames_of(snapshot, rows)
    found = {}
    for row in rows:
        frames = shown.get(row["key"], [])
        told = row | {"reason": with_names(row["reason"], names)}
        if isinstance(frames, VideoError):
            words = f"no frames, {frames.code.replace('_', ' ')}: {frames.detail}"
            found[row["key"]] = Tile(told, [], words)
        else:
            found[row["key"]] = Tile(told, frames, told["reason"])
    return found


def _border_sheets(ledger: pa.Table, borders: Sequence[Border]) -> list[Sheet]:
    """The clips on both sides of each threshold, which may be none on the side of those kept."""
    wanted = pa.array([key for border in borders for key in (*border.outside, *border.inside)], pa.string())
    rows = {row["key"]: row for row in ledger.filter(pc.is_in(ledger["key"], wanted)).to_pylist()}
    kept = pc.sum(pc.equal(ledger["status"], "kept")).as_py() or 0
    sheets = []
    for border in borders:
        near = f"{border.name} {border.value:g}"
        sheets.append(Sheet("rejected", border.score, [rows[key] for key in border.outside], border.total, near))
        if border.inside:
            sheets.append(Sheet("kept", "", [rows[key] for key in border.inside], kept, near))
    return sheets


def name_originals(ledger: pa.Table, reasons: Sequence[str]) -> dict[str, str]:
    """What reasons name as originals, by path and time instead of keys and hashes."""
    named = pa.array({name for reason in reasons for name in originals_of(reason)}, pa.string())
    clips = ledger.filter(pc.is_in(ledger["key"], named)).to_pylist()
    stands = ledger.filter(pc.invert(are_ledger_files(ledger["key"])))
    sources = stands.filter(pc.is_in(stands["source_id"], named)).group_by("source_id").aggregate([("path", "min")])
    names = dict(zip(sources["source_id"].to_pylist(), sources["path_min"].to_pylist(), strict=True))
    for row in clips:
        if row["end_s"] is not None:
            names[row["key"]] = f"{row['path']}, {row['start_s']:.1f} to {row['end_s']:.1f} s"
    return names


def choose_clips(ledger: pa.Table) -> list[Sheet]:
    """Some rows of every fate: of as many sources as can be, and of those the ones whose keys have the lowest hashes.

    So the choice is the same whenever the ledger is, and changes little when sources are added.
    """
    fates = pc.binary_join_element_wise(ledger["status"], ledger["class"], "\n")
    names, sources = (
        column.dictionary_encode().unify_dictionaries().combine_chunks() for column in (fates, ledger["path"])
    )
    codes = {"fate": names.indices.to_numpy(), "source": sources.indices.to_numpy()}
    rows = pd.DataFrame({**codes, "hash": hash_strings(ledger["key"])})
    rows["turn"] = rows.sort_values("hash").groupby(["fate", "source"]).cumcount()  # among its fate and source
    chosen = rows.sort_values(["turn", "hash"]).groupby("fate").head(CLIPS_EACH)
    totals = rows["fate"].value_counts()
    sheets = []
    for fate, indices in chosen.groupby("fate").groups.items():
        status, _, reason = names.dictionary[fate].as_py().partition("\n")
        sheets.append(Sheet(status, reason, ledger.take(pa.array(indices)).to_pylist(), int(totals[fate])))
    return sorted(sheets, key=lambda sheet: (STATUSES.index(sheet.status), -sheet.total, sheet.reason))


def hash_strings(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A hash of each string, which depends on nothing else."""
    parts = (column.slice(begin, _HASH_ROWS) for begin in range(0, len(column), _HASH_ROWS))
    hashes = [pd.util.hash_array(part.to_numpy(zero_copy_only=False), categorize=False) for part in parts]
    return np.concatenate([np.zeros(0, np.uint64), *hashes])


def _originals(ledger: pa.Table, rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """Ledger rows of what some rows are duplicates of."""
    names = pa.array({found[1] for row in rows if (found := parse_duplicate(row["reason"]))}, pa.string())
    stands = pc.invert(are_ledger_files(ledger["key"]))  # not so in rows of a source that repeats another
    contents = ledger.filter(pc.and_(pc.is_in(ledger["source_id"], names), stands)).to_pylist()
    clips = ledger.filter(pc.is_in(ledger["key"], names)).to_pylist()
    return {**{("exact", row["source_id"]): row for row in contents}, **{("near", row["key"]): row for row in clips}}


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
