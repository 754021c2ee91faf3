"""A page about one snapshot: what was kept and why not, how scores lie about their thresholds, what others would keep.

Everything comes from the ledger and the manifest; no video is read.
"""

import html
import importlib.resources
import math
import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data.card import reason_class
from pipelines.data.decide import decide
from pipelines.data.schemas import STATUSES
from pipelines.data.settings import Thresholds
from pipelines.data.snapshot import Snapshot

_BINS = 30
_WIDTH, _HEIGHT, _BASE = 320, 110, 92  # of a histogram, px; the base line of its bars
_FACTORS = (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)  # other thresholds that are tried
_SOURCES = 40  # listed

Row = dict[str, Any]


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


def what_if(scores: Sequence[Mapping[str, float]], thresholds: Thresholds) -> list[WhatIf]:
    """Try other values of every threshold that is set; only scores are decided on, near-duplicates are not sought."""

    def passing(tried: Thresholds) -> int:
        return sum(decide(score, tried)[0] == "kept" for score in scores)

    now = passing(thresholds)
    found = []
    for field in fields(thresholds):
        value = getattr(thresholds, field.name)
        if value is None:
            continue
        values = sorted({float(f"{value * factor:.3g}") for factor in _FACTORS} - {value})
        others = [(other, passing(replace(thresholds, **{field.name: other}))) for other in values]
        without = passing(replace(thresholds, **{field.name: None}))
        found.append(WhatIf(name=field.name, value=value, passing=now, others=(*others, (None, without))))
    return found


def write_report(path: Path, snapshot: Snapshot) -> None:
    """Write the page.

    Args:
        path: The HTML file; its folder is made.
        snapshot: What it is about.
    """
    manifest, rows = snapshot.manifest, snapshot.read_ledger().to_pylist()
    scored = [row for row in rows if row["scores"] is not None]
    thresholds = Thresholds(**manifest.created_from["config"]["thresholds"])
    template = string.Template(
        (importlib.resources.files("pipelines.data") / "report.html.template").read_text(encoding="utf-8")
    )
    totals = ", ".join(f"{name} {total.rows} clips, {total.tokens} tokens" for name, total in manifest.totals.items())
    tokenizer = f"{manifest.tokenizer.kind}, {manifest.tokenizer.codebook_size} codes"
    page = template.substitute(
        title=html.escape(f"Snapshot {manifest.snapshot_id}"),
        what=html.escape(f"{totals}. Tokenizer: {tokenizer}. Near-duplicates and captions are decided after scores."),
        counts=_counts(rows),
        reasons=_reasons(rows),
        histograms="\n".join(_histograms(scored, thresholds)),
        what_if=_what_if_table(what_if([row["scores"] for row in scored], thresholds)),
        sources=_sources(rows),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _counts(rows: Sequence[Row]) -> str:
    counts = Counter(row["status"] for row in rows)
    return "".join(f'<li class="{status}"><b>{counts[status]}</b> {status}</li>' for status in STATUSES)


def _reasons(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["status"], "" if row["status"] == "kept" else reason_class(row["reason"])].append(row)
    lines = []
    for (status, reason), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        example = members[0]
        told = f"{example['path']}: {example['reason']}" if example["reason"] else example["path"]
        lines.append(
            _cells(
                status, reason, len(members), f"{_seconds(members):.0f}", told if len(told) < 140 else told[:139] + "…"
            )
        )
    return "\n".join(lines)


def _sources(rows: Sequence[Row]) -> str:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["path"]].append(row)
    lines = []
    for path, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:_SOURCES]:
        kept = [row for row in members if row["status"] == "kept"]
        others = Counter(reason_class(row["reason"]) for row in members if row["status"] != "kept")
        told = ", ".join(f"{count} {reason}" for reason, count in others.most_common(4))
        lines.append(_cells(path, len(members), len(kept), f"{_seconds(kept):.0f} of {_seconds(members):.0f}", told))
    if len(groups) > _SOURCES:
        lines.append(_cells(f"and {len(groups) - _SOURCES} more", "", "", "", ""))
    return "\n".join(lines)


def _seconds(rows: Sequence[Row]) -> float:
    return float(sum(row["end_s"] - row["start_s"] for row in rows if row["end_s"] is not None))


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


def _histograms(rows: Sequence[Row], thresholds: Thresholds) -> Iterator[str]:
    names = list(rows[0]["scores"]) if rows else []
    for name in names:
        kept = [row["scores"][name] for row in rows if row["status"] == "kept"]
        other = [row["scores"][name] for row in rows if row["status"] != "kept"]
        values = [value for value in kept + other if value is not None and math.isfinite(value)]
        bounds = [getattr(thresholds, f"{side}_{name}", None) for side in ("min", "max")]
        if values and (min(values) < max(values) or any(bound is not None for bound in bounds)):
            yield _histogram(name, kept, other, [bound for bound in bounds if bound is not None])


def _histogram(name: str, kept: Sequence[float], other: Sequence[float], bounds: Sequence[float]) -> str:
    """Bars of kept clips below those of the others, and a line at each threshold."""
    low, high = min([*kept, *other]), max([*kept, *other])
    near = [bound for bound in bounds if low - (high - low) <= bound <= high + (high - low)]
    low, high = min([low, *near]), max([high, *near])
    high = high if high > low else low + 1
    counts = [np.histogram(part, bins=_BINS, range=(low, high))[0] for part in (kept, other)]
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
    limits = ", ".join(f"{bound:g}" for bound in bounds)
    caption = html.escape(name) + (f" <i>threshold {limits}</i>" if bounds else "")
    return f"<figure><figcaption>{caption}</figcaption>{''.join(parts)}</figure>"
