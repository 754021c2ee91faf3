"""A comparison as text for a terminal, and as a folder with a page, CSV and JSON."""

import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from markupsafe import Markup

from pipelines.errors import UserError
from pipelines.evaluation.compare.figures import (
    HEADLINES,
    WORDS,
    Comparison,
    Figure,
    Group,
    as_json,
    mean_curve,
    table_rows,
    thinned,
)
from pipelines.evaluation.compare.runs import Run, RunStore, Sample
from pipelines.pages.plots import Points, line_chart, smooth
from pipelines.pages.render import data_uri, write_page

PAGE, TABLE, VALUES = "compare.html", "runs.csv", "compare.json"
_SMOOTH = 20  # a curve is smoothed over one part in so many of it
_MAX_PROMPTS = 24  # shown
_MAX_BYTES = 40_000_000  # of samples on a page
_MEDIA = {".mp4": "video/mp4", ".png": "image/png"}


def as_text(comparison: Comparison) -> str:
    """Groups, their headline figures and costs, and what differs, in columns."""
    heads = [name for name in HEADLINES if name in comparison.metrics]
    rows = [
        ["group", "runs", "steps", *(HEADLINES[name] for name in heads), "device hours", "tokens", "FLOPs", "tokens/s"]
    ]
    for group in comparison.groups:
        cost = group.cost
        rows.append(
            [
                group.label,
                str(len(group.runs)),
                steps_text(group),
                *(figure_text(group.final.get(name)) for name in heads),
                f"{cost.device_hours:.3g}",
                amount(cost.tokens),
                "-" if cost.flops is None else f"{cost.flops:.3g}",
                f"{cost.tokens_per_s:,.0f}",
            ]
        )
    lines = _columns(rows)
    if comparison.differing:
        head = ["differs", *(group.label for group in comparison.groups)]
        body = [[key, *(group.differences[key] for group in comparison.groups)] for key in comparison.differing]
        lines += ["", *_columns([head, *body])]
    for headline, members in comparison.frame_metrics.items():
        head = [f"{HEADLINES[headline]} by frame", *(str(index + 1) for index in range(len(members)))]
        body = [
            [group.label, *(f"{group.final[name].mean:.3f}" if name in group.final else "-" for name in members)]
            for group in comparison.groups
        ]
        lines += ["", *_columns([head, *body])]
    return "\n".join([*lines, "", _legend(comparison)])


def write_report(folder: Path, comparison: Comparison, store: RunStore) -> None:
    """Write ``compare.html``, ``runs.csv`` and ``compare.json`` into a folder.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VALUES).write_text(json.dumps(as_json(comparison), indent=2) + "\n")
        rows = table_rows(comparison)
        with (folder / TABLE).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(chain.from_iterable(rows))))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}): name another folder") from error
    write_page(
        folder / PAGE,
        "compare.html.j2",
        comparison=comparison,
        headlines=HEADLINES,
        words=WORDS,
        amount=amount,
        charts=_charts(comparison),
        samples=_samples(comparison, store),
        figure_text=figure_text,
        steps_text=steps_text,
        legend=_legend(comparison),
    )


def figure_text(figure: Figure | None) -> str:
    """A mean with half the width of its interval, if it has one."""
    if figure is None:
        return "-"
    mean = _number(figure.mean)
    return mean if figure.interval is None else f"{mean} ± {_number((figure.interval[1] - figure.interval[0]) / 2)}"


def steps_text(group: Group) -> str:
    """Steps of a group's runs."""
    low, high = min(group.steps), max(group.steps)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def amount(count: float) -> str:
    """A large count in thousands, millions, billions or trillions."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _legend(comparison: Comparison) -> str:
    several = any(len(group.runs) > 1 for group in comparison.groups)
    words = f"Figures are means of the last {comparison.last} steps; of what is measured less often, the last value."
    if several:
        words += " ± is half of a 95 % interval of the mean over seeds (Student's t)."
    if len({steps for group in comparison.groups for steps in group.steps}) > 1:
        words += " Runs have different numbers of steps: each figure is of its own run's end."
    going = [run.name for group in comparison.groups for run in group.runs if run.status == "RUNNING"]
    if going:
        words += f" Not ended yet, so as far as they are: {', '.join(going)}."
    return words + " FLOPs: 6 per weight of a matrix and token, attention left out."


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _charts(comparison: Comparison) -> list[tuple[str, str, Markup]]:
    """Heading, caption and drawing of each chart."""
    charts = []
    for name, words in HEADLINES.items():
        lines: dict[str, Points] = {}
        faint = []
        for group in comparison.groups:
            window = max(1, max(group.steps) // _SMOOTH) if name == "loss" else 1
            if len(group.runs) > 1:
                for run in group.runs:
                    label = f"{group.label}, seed {run.params.get('seed', '?')}"
                    lines[label] = _smoothed(run.curves.get(name, {}), window)
                    faint.append(label)
            lines[group.label] = _smoothed(mean_curve(group.runs, name), window)
        caption = "Nats per masked visual token; the axis is logarithmic." + (" Smoothed." if name == "loss" else "")
        caption += " Pale lines: single seeds; bold: their mean." if faint else ""
        drawn = {label: points for label, points in lines.items() if points}
        chart = line_chart(
            drawn, title=f"{words} by step", x_label="step", y_label="nats per token",
            faint=[label for label in faint if label in drawn],
        ) if drawn else None  # fmt: skip
        if chart is not None:
            charts.append((words.capitalize(), caption, chart))
    for headline, members in comparison.frame_metrics.items():
        by_frame: dict[str, Points] = {
            group.label: [
                (index + 1.0, group.final[name].mean) for index, name in enumerate(members) if name in group.final
            ]
            for group in comparison.groups
        }
        chart = line_chart(
            by_frame, title=f"{HEADLINES[headline]} by latent frame", x_label="latent frame", y_label="nats per token"
        )
        if chart is not None and len(members) > 1:
            caption = (
                "At the end of training. Frame 1 has no history to look at; a loss that falls steeply from frame to "
                "frame is a sign that later frames copy what they see of earlier ones."
            )
            charts.append((f"{HEADLINES[headline].capitalize()} by latent frame", caption, chart))
    return charts


def _smoothed(curve: Mapping[int, float], window: int) -> Points:
    points = thinned(curve)
    if not points:
        return []
    return smooth(points, max(1, round(window * len(points) / max(1, len(curve)))))


def _samples(comparison: Comparison, store: RunStore) -> list[tuple[str, list[tuple[str, int, str, str] | None]]]:
    """By what was asked for: of every group's first run, label, step, media type and URI of its newest sample."""
    newest: list[dict[str, Sample]] = []
    for group in comparison.groups:
        found: dict[str, Sample] = {}
        for sample in sorted(group.runs[0].samples, key=lambda sample: sample.step):
            found[sample.key] = sample
        newest.append(found)
    keys = list(dict.fromkeys(chain.from_iterable(newest)))[:_MAX_PROMPTS]
    shown: list[tuple[str, list[tuple[str, int, str, str] | None]]] = []
    size = 0
    with tempfile.TemporaryDirectory(prefix="lumos-compare-") as scratch:
        for key in keys:
            row: list[tuple[str, int, str, str] | None] = []
            for group, found in zip(comparison.groups, newest, strict=True):
                if key not in found:
                    row.append(None)
                    continue
                file = _fetch(store, group.runs[0], found[key], Path(scratch))
                size += file.stat().st_size
                uri = data_uri(file, _MEDIA[file.suffix]) if size <= _MAX_BYTES else None
                row.append((group.label, found[key].step, _MEDIA[file.suffix], uri) if uri else None)
            shown.append((key, row))
    return shown


def _fetch(store: RunStore, run: Run, sample: Sample, scratch: Path) -> Path:
    folder = scratch / run.run_id
    folder.mkdir(exist_ok=True)
    return store.artifact(run, sample.path, folder)
