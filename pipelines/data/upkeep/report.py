"""What the page about a snapshot shows: what was kept and why not, how scores lie, what other thresholds would keep.

Everything but the contact sheets comes from the ledger and the manifest. The ledger is held in columns, as it may have
millions of rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

from lumos.tokenizers import VideoTokenizer
from pipelines.data.config import TokenConfig
from pipelines.data.reasons import reason_classes, with_names
from pipelines.data.scores import SCORES, Thresholds
from pipelines.data.settings import stage_place
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.snapshot.reconstruction import Reconstruction, read_reconstruction
from pipelines.data.snapshot.schemas import STATUSES
from pipelines.data.stage.log import stage_timings
from pipelines.data.stage.stage import Row
from pipelines.data.steps.decide import bounds, fills, keeps
from pipelines.data.upkeep.borderline import Border, find_borders
from pipelines.data.upkeep.browse import browse_rows
from pipelines.data.upkeep.contact import CLIPS_EACH, IDENTITY, Decoded, Worst, contact_sheets, name_originals
from pipelines.data.upkeep.show import Shown, show_clips
from pipelines.data.upkeep.stills import decode_frames, frame_tile
from pipelines.media import encode_video
from pipelines.pages.plots import Values, histogram
from pipelines.pages.render import check_writable, write_page

_COLUMNS = ("path", "start_s", "end_s", "status", "reason")  # of the ledger
_FACTORS = (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)  # other thresholds that are tried
_SOURCES = 40  # listed
_WORST = 6  # clips, of the lowest PSNR, that are shown
_PREVIEW_HEIGHT, _PREVIEW_CRF = 128, 28  # px and quality of moving previews, of about 30 kB each

Histogram = tuple[str, Sequence[float], Markup]  # a score, its thresholds, the plot


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """How many clips one threshold would pass at other values, all others being as they are."""

    name: str  # a field of `Thresholds`
    value: float
    passing: int  # clips that pass all thresholds now
    # (value, clips that would pass), by value; the last is None: without this threshold
    others: tuple[tuple[float | None, int], ...]
    note: str = ""  # why other values change nothing that they might have changed


def what_if(scores: Mapping[str, Values], thresholds: Thresholds, tokens: TokenConfig | None = None) -> list[WhatIf]:
    """Try other values of every threshold that is set; only scores are decided on, near-duplicates are not sought.

    ``tokens`` says what is encoded; a clip too short or too small for that is not kept either.
    """
    filled = fills(scores, tokens) if tokens else True

    def passing(tried: Thresholds) -> int:
        return int(np.count_nonzero(keeps(scores, tried) & filled))

    now = passing(thresholds)
    found = []
    for field in fields(thresholds):
        value = getattr(thresholds, field.name)
        if value is None:
            continue
        values = {float(f"{value * factor:.3g}") for factor in _FACTORS} - {value}
        if SCORES[field.name.partition("_")[2]].share:
            values = {other for other in values if other <= 1}
        others = [(other, passing(replace(thresholds, **{field.name: other}))) for other in sorted(values)]
        without = passing(replace(thresholds, **{field.name: None}))
        note = ""
        if tokens and field.name == "min_duration" and without == now:
            more = keeps(scores, replace(thresholds, min_duration=None)) & ~keeps(scores, thresholds)
            if more.any() and not fills(scores, replace(tokens, max_enlargement=None))[more].any():
                lacking = f"the {tokens.shortest_video or 0} frames at {tokens.fps:g} fps"
                note = f"less changes nothing: shorter clips lack {lacking}"
        found.append(WhatIf(name=field.name, value=value, passing=now, others=(*others, (None, without)), note=note))
    return found


def score_columns(ledger: pa.Table) -> dict[str, Values]:
    """Of the rows of a ledger that were scored, one array per score, nan where it is null."""
    scores = ledger["scores"].drop_null()
    names = [field.name for field in scores.type]
    return {name: column.to_numpy() for name, column in zip(names, scores.flatten(), strict=True)}


def write_report(
    path: Path, snapshot: Snapshot, *, frames: bool = True, tokenizer: VideoTokenizer | None = None
) -> None:
    """Write the page about a snapshot; its folder is made.

    With ``frames``, frames of some clips are decoded for contact sheets, and with their tokenizer what the codes of
    some show; bars on stderr tell how far that is.

    Raises:
        UserError: if the file cannot be written; nothing was begun.
    """
    check_writable(path)
    scores = _scores(snapshot)
    ledger = snapshot.read_ledger([*_COLUMNS, *IDENTITY])
    ledger = ledger.append_column("class", reason_classes(ledger["reason"]))
    ledger = ledger.append_column("seconds", pc.fill_null(pc.subtract(ledger["end_s"], ledger["start_s"]), 0.0))
    reasons = _count(
        ledger, ["status", "class"], ("seconds", "sum"), ("path", "first"), ("reason", "first")
    ).to_pylist()
    names = name_originals(ledger, [row["reason_first"] for row in reasons])
    timings = stage_timings(snapshot.dataset) if snapshot.dataset else {}
    codes_of = partial(_decoded, tokenizer=tokenizer) if tokenizer is not None else None
    write_page(
        path,
        "data_report.html.j2",
        manifest=snapshot.manifest,
        statuses=STATUSES,
        reasons=[row | {"reason_first": with_names(row["reason_first"], names)} for row in reasons],
        reconstruction=scores.reconstruction,
        histograms=scores.histograms,
        what_if=scores.what_if,
        sources=_sources(ledger),
        num_sources=pc.count_distinct(ledger["path"]).as_py(),
        stages=sorted(timings.items(), key=lambda item: stage_place(item[0])),
        browse=browse_rows(snapshot),
        sheets=contact_sheets(
            snapshot, ledger, decode_frames, borders=scores.borders, worst=scores.worst, codes_of=codes_of
        )
        if frames
        else [],
        clips_each=CLIPS_EACH,
        decoded=tokenizer is not None,
    )


def _decoded(snapshot: Snapshot, keys: Sequence[str], *, tokenizer: VideoTokenizer) -> dict[str, Decoded]:
    """What the codes of clips show at some moments, beside their sources."""
    found = {}
    for clip in show_clips(snapshot, keys, tokenizer):
        last = len(clip.decoded) - 1
        moments = list(dict.fromkeys((0, last // 2, last)))
        source = [] if isinstance(clip.source, str) else [frame_tile(clip.source[moment]) for moment in moments]
        codes = [frame_tile(clip.decoded[moment]) for moment in moments]
        found[clip.row["key"]] = Decoded(source, codes, clip.psnr, _preview(clip) if last else b"")
    return found


def _preview(clip: Shown) -> bytes:
    """An mp4 of what a clip shows, source and codes side by side, as wide as two frames of its strip."""
    frames = clip.frames
    height = min(_PREVIEW_HEIGHT, frames.shape[1])
    size = round(frames.shape[2] * height / frames.shape[1] / 2) * 2, height
    small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
    return encode_video(small, clip.row["fps"], crf=_PREVIEW_CRF)


@dataclass(frozen=True)
class _Scores:
    """What of the page depends on scores."""

    reconstruction: Reconstruction
    worst: Worst
    histograms: list[Histogram]
    what_if: list[WhatIf]
    borders: list[Border]


def _scores(snapshot: Snapshot) -> _Scores:
    """What of the page depends on scores; they are a third of a ledger, and held no longer than here."""
    config = snapshot.manifest.created_from["config"]
    # A threshold that is newer than the snapshot did not decide on it.
    thresholds = Thresholds(**{field.name: config["thresholds"].get(field.name) for field in fields(Thresholds)})
    ledger = snapshot.read_ledger(["key", "status", "reason", "scores"])
    ledger = ledger.filter(pc.is_valid(ledger["scores"]))
    scores = score_columns(ledger)
    kept = pc.equal(ledger["status"], "kept").to_numpy()
    return _Scores(
        read_reconstruction([ledger]),
        _worst(ledger["key"], scores, kept),
        list(_histograms(scores, kept, thresholds)),
        what_if(scores, thresholds, _tokens(config)),
        find_borders(ledger, scores, thresholds),
    )


def _worst(keys: pa.ChunkedArray, scores: Mapping[str, Values], kept: NDArray[np.bool_]) -> Worst:
    """The kept clips of the lowest PSNR."""
    nobody = np.full(len(keys), np.nan)  # an older ledger lacks scores
    psnr, ssim = scores.get("psnr", nobody), scores.get("ssim", nobody)
    measured = np.flatnonzero(kept & np.isfinite(psnr))
    lowest = measured[np.argsort(psnr[measured], kind="stable")][:_WORST].tolist()
    clips = {keys[i].as_py(): (float(psnr[i]), float(ssim[i]) if np.isfinite(ssim[i]) else None) for i in lowest}
    return Worst(clips, len(measured))


def _tokens(config: Mapping[str, Any]) -> TokenConfig | None:
    """What a snapshot's config says of the shapes that are encoded; one that limits no enlargement is an older one."""
    if "tokens" not in config:
        return None
    values = {"max_enlargement": None} | config["tokens"]
    names = ("fps", "num_frames", "sizes", "area", "multiple", "max_enlargement")
    shapes: dict[str, Any] = {name: values[name] for name in names if name in values}
    lists = {name: tuple(shapes[name]) for name in ("num_frames", "sizes") if shapes.get(name) is not None}
    return TokenConfig(**(shapes | lists))


def _histograms(scores: Mapping[str, Values], kept: NDArray[np.bool_], thresholds: Thresholds) -> Iterator[Histogram]:
    limits = {score.name: [each for each in pair if each is not None] for score, *pair in bounds(thresholds)}
    for name, values in scores.items():
        known, near = np.isfinite(values), limits.get(name, [])
        if known.any() and (near or np.ptp(values[known])):
            groups = {"kept": values[known & kept], "rejected": values[known & ~kept]}
            yield name, near, histogram(name, groups, near)


def _sources(ledger: pa.Table) -> dict[str, list[Row]]:
    """Of the sources with most rows, these rows counted by status and class of reason."""
    paths = _count(ledger, ["path"])["path"][:_SOURCES].combine_chunks()
    parts: dict[str, list[Row]] = {path: [] for path in paths.to_pylist()}
    rows = ledger.filter(pc.is_in(ledger["path"], paths))
    for part in _count(rows, ["path", "status", "class"], ("seconds", "sum")).to_pylist():
        parts[part["path"]].append(part)
    return parts


def _count(ledger: pa.Table, by: Sequence[str], *more: tuple[str, str]) -> pa.Table:
    """How many rows ("count_all") have each value of some columns, most frequent first; further aggregates as asked."""
    groups = ledger.group_by(list(by), use_threads=False).aggregate([([], "count_all"), *more])
    return groups.sort_by([("count_all", "descending"), *((name, "ascending") for name in by)])
