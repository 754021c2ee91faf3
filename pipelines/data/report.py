"""A page about one snapshot: what was kept and why not, how scores lie about their thresholds, what others would keep.

Everything but the contact sheets comes from the ledger and the manifest. The ledger is held in columns, as it may have
millions of rows.
"""

import errno
import html
import importlib.resources
import os
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data.card import reason_classes
from pipelines.data.contact import IDENTITY, contact_sheets
from pipelines.data.decide import bounds, fills, is_share, keeps
from pipelines.data.runlog import StageProgress, stage_timings
from pipelines.data.schemas import STATUSES, stage_place
from pipelines.data.settings import Thresholds
from pipelines.data.snapshot import Snapshot
from pipelines.errors import UserError

_COLUMNS = ("path", "start_s", "end_s", "status", "reason")  # of the ledger
_BINS = 30
_WIDTH, _HEIGHT, _BASE = 320, 110, 92  # of a histogram, px; the base line of its bars
_FACTORS = (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)  # other thresholds that are tried
_SOURCES = 40  # listed
_CAUSES = 4  # listed of each source

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """How many clips one threshold would pass at other values, all others being as they are.

    Attributes:
        name: A field of `Thresholds`.
        value: What it is.
        passing: Clips that pass all thresholds now.
        others: (value, clips that would pass), by value; the last is None: without this threshold.
    """

    name: str
    value: float
    passing: int
    others: tuple[tuple[float | None, int], ...]


def what_if(
    scores: Mapping[str, Values], thresholds: Thresholds, tokens: Mapping[str, Any] | None = None
) -> list[WhatIf]:
    """Try other values of every threshold that is set; only scores are decided on, near-duplicates are not sought.

    Args:
        scores: As ``score_columns`` gives them.
        thresholds: What they are now.
        tokens: ``num_frames`` and ``fps`` of the clips that are encoded; one too short for them is not kept either.
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
        if is_share(field.name.partition("_")[2]):
            values = {other for other in values if other <= 1}
        others = [(other, passing(replace(thresholds, **{field.name: other}))) for other in sorted(values)]
        without = passing(replace(thresholds, **{field.name: None}))
        found.append(WhatIf(name=field.name, value=value, passing=now, others=(*others, (None, without))))
    return found


def score_columns(ledger: pa.Table) -> dict[str, Values]:
    """Of the rows of a ledger that were scored, one array per score, nan where it is null."""
    scores = ledger["scores"].drop_null()
    names = [field.name for field in scores.type]
    return {name: column.to_numpy() for name, column in zip(names, scores.flatten(), strict=True)}


def write_report(path: Path, snapshot: Snapshot, *, frames: bool = True) -> None:
    """Write the page.

    Args:
        path: The HTML file; its folder is made.
        snapshot: What it is about.
        frames: Whether to decode frames of some clips, for contact sheets. A bar on stderr tells how far that is.

    Raises:
        UserError: if the file cannot be written; nothing was begun.
    """
    _check_writable(path)
    manifest = snapshot.manifest
    template = string.Template(
        (importlib.resources.files("pipelines.data") / "report.html.template").read_text(encoding="utf-8")
    )
    totals = ", ".join(f"{name} {total.rows} clips, {total.tokens} tokens" for name, total in manifest.totals.items())
    tokenizer = f"{manifest.tokenizer.kind}, {manifest.tokenizer.codebook_size} codes"
    parts = _score_parts(snapshot)
    ledger = snapshot.read_ledger([*_COLUMNS, *(IDENTITY if frames else ())])
    ledger = ledger.append_column("class", reason_classes(ledger["reason"]))
    ledger = ledger.append_column("seconds", pc.subtract(ledger["end_s"], ledger["start_s"]))
    page = template.substitute(
        parts,
        title=html.escape(f"Snapshot {manifest.snapshot_id}"),
        what=html.escape(f"{totals}. Tokenizer: {tokenizer}. Near-duplicates and captions are decided after scores."),
        counts=_counts(ledger),
        reasons=_reasons(ledger),
        sources=_sources(ledger),
        stages=_stages(snapshot.dataset),
        contact=contact_sheets(snapshot, ledger) if frames else "",
    )
    path.write_text(page, encoding="utf-8")


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}); name another file") from error


def _stages(dataset: str | None) -> str:
    """Rows of what each stage took when it last had something to do."""
    lines = []
    for name, (began, took) in _timings(dataset) if dataset else ():
        rate = f"{took.source_s / took.seconds:.3g}" if took.seconds and took.source_s else ""
        times = (f"{took.seconds:.1f}", f"{took.busy_s:.1f}")
        lines.append(_cells(name, began, took.computed, took.failed, *times, rate))
    return "\n".join(lines)


def _timings(dataset: str) -> list[tuple[str, tuple[str, StageProgress]]]:
    return sorted(stage_timings(dataset).items(), key=lambda item: stage_place(item[0]))


def _score_parts(snapshot: Snapshot) -> dict[str, str]:
    """What of the page depends on scores; they are a third of a ledger, and held no longer than here."""
    recorded = snapshot.manifest.created_from["config"]["thresholds"]
    # A threshold that is newer than the snapshot did not decide on it.
    thresholds = Thresholds(**{field.name: recorded.get(field.name) for field in fields(Thresholds)})
    ledger = snapshot.read_ledger(["status", "scores"])
    scores = score_columns(ledger)
    kept = pc.equal(ledger["status"].filter(pc.is_valid(ledger["scores"])), "kept").to_numpy()
    return {
        "histograms": "\n".join(_histograms(scores, kept, thresholds)),
        "what_if": _what_if_table(what_if(scores, thresholds, snapshot.manifest.created_from["config"].get("tokens"))),
    }


def _count(ledger: pa.Table, by: Sequence[str], *more: tuple[str, str]) -> pa.Table:
    """How many rows ("count_all") have each value of some columns, most frequent first; further aggregates as asked."""
    groups = ledger.group_by(list(by), use_threads=False).aggregate([([], "count_all"), *more])
    return groups.sort_by([("count_all", "descending"), *((name, "ascending") for name in by)])


def _counts(ledger: pa.Table) -> str:
    counts = {row["status"]: row["count_all"] for row in _count(ledger, ["status"]).to_pylist()}
    return "".join(f'<li class="{status}"><b>{counts.get(status, 0)}</b> {status}</li>' for status in STATUSES)


def _reasons(ledger: pa.Table) -> str:
    numbered = ledger.append_column("row", pa.array(np.arange(ledger.num_rows)))
    lines = []
    for group in _count(numbered, ["status", "class"], ("seconds", "sum"), ("row", "min")).to_pylist():
        path, reason = (ledger[name][group["row_min"]].as_py() for name in ("path", "reason"))
        told = f"{path}: {reason}" if reason else path
        seconds = f"{group['seconds_sum'] or 0:.0f}"
        short = told if len(told) < 140 else told[:139] + "…"
        lines.append(_cells(group["status"], group["class"], group["count_all"], seconds, short))
    return "\n".join(lines)


def _sources(ledger: pa.Table) -> str:
    counts = _count(ledger, ["path"])
    listed = counts["path"].slice(0, _SOURCES).combine_chunks()
    parts: dict[str, list[dict[str, Any]]] = {path: [] for path in listed.to_pylist()}
    rows = ledger.filter(pc.is_in(ledger["path"], listed))
    for part in _count(rows, ["path", "status", "class"], ("seconds", "sum")).to_pylist():
        parts[part["path"]].append(part)
    lines = [_source(path, members) for path, members in parts.items()]
    if len(counts) > _SOURCES:
        lines.append(_cells(f"and {len(counts) - _SOURCES} more", "", "", "", ""))
    return "\n".join(lines)


def _source(path: str, parts: Sequence[Mapping[str, Any]]) -> str:
    """A line about one source; its parts are rows of one status and class of reason."""
    kept = [part for part in parts if part["status"] == "kept"]
    others: Counter[str] = Counter()
    for part in parts:
        if part["status"] != "kept":
            others[part["class"]] += part["count_all"]
    count, count_kept = (sum(part["count_all"] for part in some) for some in (parts, kept))
    seconds, seconds_kept = (sum(part["seconds_sum"] or 0 for part in some) for some in (parts, kept))
    told = ", ".join(f"{number} {reason}" for reason, number in others.most_common(_CAUSES))
    return _cells(path, count, count_kept, f"{seconds_kept:.0f} of {seconds:.0f}", told)


def _cells(*values: object) -> str:
    cells = "".join(
        f'<td class="number">{value}</td>' if isinstance(value, int) else f"<td>{html.escape(str(value))}</td>"
        for value in values
    )
    return f"<tr>{cells}</tr>"


def _what_if_table(found: Sequence[WhatIf]) -> str:
    lines = []
    for item in found:
        others = "".join(
            f"<span><code>{'none' if value is None else f'{value:g}'}</code> {count} "
            f"<i>({count - item.passing:+d})</i></span>"
            for value, count in item.others
        )
        lines.append(
            f"<tr><td><code>thresholds.{item.name}={item.value:g}</code></td>"
            f'<td class="number">{item.passing}</td><td class="others">{others}</td></tr>'
        )
    return "\n".join(lines)


def _histograms(scores: Mapping[str, Values], kept: NDArray[np.bool_], thresholds: Thresholds) -> Iterator[str]:
    limits = {name: [bound for bound in pair if bound is not None] for name, *pair in bounds(thresholds)}
    for name, values in scores.items():
        known = np.isfinite(values)
        parts = values[known & kept], values[known & ~kept]
        found = values[known]
        if len(found) and (found.min() < found.max() or limits.get(name)):
            yield _histogram(name, parts, limits.get(name, []))


def _histogram(name: str, values: tuple[Values, Values], limits: Sequence[float]) -> str:
    """Bars of kept clips below those of the others, and a line at each threshold."""
    both = np.concatenate(values)
    low, high = float(both.min()), float(both.max())
    margin = (high - low) or 1  # within which a threshold is worth its room
    near = [bound for bound in limits if low - margin <= bound <= high + margin]
    low, high = min([low, *near]), max([high, *near])
    high = high if high > low else low + 1
    counts = [np.histogram(part, bins=_BINS, range=(low, high))[0] for part in values]
    top = max(1, int((counts[0] + counts[1]).max()))
    step = _WIDTH / _BINS
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(name)}">']
    for index in range(_BINS):
        base = float(_BASE)
        for part, style in zip(counts, ("kept", "rejected"), strict=True):
            height = (_BASE - 6) * int(part[index]) / top
            base -= height
            if height:
                parts.append(
                    f'<rect class="{style}" x="{index * step:.1f}" y="{base:.1f}" width="{step - 1:.1f}" '
                    f'height="{height:.1f}"/>'
                )
    for bound in near:
        x = (bound - low) / (high - low) * _WIDTH
        parts.append(f'<path class="threshold" d="M{x:.1f} 2V{_BASE}"/>')
    parts.append(f'<text x="0" y="{_HEIGHT - 4}">{low:.4g}</text>')
    parts.append(f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{high:.4g}</text></svg>')
    told = ", ".join(f"{limit:g}" for limit in limits)
    caption = html.escape(name) + (f" <i>threshold {told}</i>" if limits else "")
    return f"<figure><figcaption>{caption}</figcaption>{''.join(parts)}</figure>"
