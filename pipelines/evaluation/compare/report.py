"""A comparison as text for a terminal, and as a folder with a page, CSV and JSON."""

import csv
import json
import tempfile
from itertools import chain
from pathlib import Path

from markupsafe import Markup

from pipelines.amounts import amount, columns
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
from pipelines.evaluation.compare.runs import Curve, RunStore
from pipelines.pages.plots import Points, line_chart, smooth
from pipelines.pages.render import data_uri, write_page

PAGE, TABLE, VALUES = "compare.html", "runs.csv", "compare.json"
_SMOOTH = 20  # a curve is smoothed over one part in so many of it
_MAX_PROMPTS = 24  # shown
_MAX_BYTES = 40_000_000  # of samples on a page

# A sample on the page: label of its group, step, and the video's URI, None where there is no room; None: no sample.
Shown = tuple[str, int, str | None] | None


def as_text(comparison: Comparison) -> str:
    """Groups, their headline figures and costs, and what differs, in columns."""
    heads = [name for name in HEADLINES if name in comparison.metrics]
    rows = [
        [
            "group",
            "runs",
            "steps",
            *(HEADLINES[name] for name in heads),
            "device hours",
            "tokens",
            "FLOPs",
            "tokens/s of a run",
        ]
    ]
    for group in comparison.groups:
        cost = group.cost
        rows.append(
            [
                group.label,
                str(len(group.runs)),
                _steps(group),
                *(figure_text(group.final.get(name)) for name in heads),
                f"{cost.device_hours:.3g}",
                amount(cost.tokens),
                "-" if cost.flops is None else f"{cost.flops:.3g}",
                f"{cost.tokens_per_s:,.0f}",
            ]
        )
    lines = columns(rows)
    if comparison.differing:
        head = ["differs", *(group.label for group in comparison.groups)]
        body = [[key, *(group.differences[key] for group in comparison.groups)] for key in comparison.differing]
        lines += ["", *columns([head, *body])]
    for headline, members in comparison.frame_metrics.items():
        head = [f"{HEADLINES[headline]} by frame", *(str(index + 1) for index in range(len(members)))]
        body = [
            [group.label, *(f"{group.final[name].mean:.3f}" if name in group.final else "-" for name in members)]
            for group in comparison.groups
        ]
        lines += ["", *columns([head, *body])]
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
        legend=_legend(comparison),
    )


def figure_text(figure: Figure | None, *, with_interval: bool = True) -> str:
    """A mean, with half the width of its interval if it has one."""
    if figure is None:
        return "-"
    mean = _number(figure.mean)
    if figure.interval is None or not with_interval:
        return mean
    half = (figure.interval[1] - figure.interval[0]) / 2
    return f"{mean} ± {half:.2g}" if half < 99.5 else f"{mean} ± {_number(half)}"


def _steps(group: Group) -> str:
    low, high = min(group.steps), max(group.steps)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _legend(comparison: Comparison) -> str:
    several = any(len(group.runs) > 1 for group in comparison.groups)
    words = (
        f"Training losses, seconds of a step and tokens/s are means over the last {comparison.last} steps; other "
        "figures are the last value."
    )
    if several:
        words += (
            " ± is half of a 95 % interval of the mean over seeds (Student's t); compare.json has those of all metrics."
        )
    if len({steps for group in comparison.groups for steps in group.steps}) > 1:
        words += " Runs have different numbers of steps: each figure is of its own run's end."
    going = [run.name for group in comparison.groups for run in group.runs if run.status == "RUNNING"]
    if going:
        words += f" Not ended yet, so as far as they are: {', '.join(going)}."
    return words + " FLOPs: 6 per weight of a matrix and token, attention left out."


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _charts(comparison: Comparison) -> list[tuple[str, str, Markup]]:
    """Heading, caption and drawing of each chart."""
    charts = []
    for name, words in HEADLINES.items():
        lines: dict[str, Points] = {}
        faint: list[str] = []
        for group in comparison.groups:
            window = max(1, max(group.steps) // _SMOOTH) if name == "loss" else 1
            curves: dict[str, Curve] = {}
            if len(group.runs) > 1:
                for run in group.runs:
                    curves[f"_{group.label}, seed {run.params.get('seed', '?')}"] = run.curves.get(name, {})
                faint += curves
            curves[group.label] = mean_curve(group.runs, name)
            lines |= {label: _smoothed(curve, window) for label, curve in curves.items() if curve}
        caption = "Nats per masked visual token; the axis is logarithmic." + (" Smoothed." if name == "loss" else "")
        caption += " Pale lines: single seeds; bold: their mean." if faint else ""
        chart = line_chart(lines, title=f"{words} by step", x_label="step", y_label="nats per token", faint=faint)
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


def _smoothed(curve: Curve, window: int) -> Points:
    points = thinned(curve)
    return smooth(points, max(1, round(window * len(points) / len(curve))))


def _samples(comparison: Comparison, store: RunStore) -> list[tuple[str, list[Shown]]]:
    """By prompt, the newest sample of every group's first run."""
    shown: list[tuple[str, list[Shown]]] = []
    size = 0
    with tempfile.TemporaryDirectory(prefix="lumos-compare-") as scratch:
        newest = [store.newest_samples(group.runs[0], Path(scratch)) for group in comparison.groups]
        prompts = dict.fromkeys(chain.from_iterable(videos for _, videos in newest))
        for prompt in list(prompts)[:_MAX_PROMPTS]:
            row: list[Shown] = []
            for group, (step, videos) in zip(comparison.groups, newest, strict=True):
                if prompt not in videos:
                    row.append(None)
                    continue
                size += videos[prompt].stat().st_size
                uri = data_uri(videos[prompt], "video/mp4") if size <= _MAX_BYTES else None
                row.append((group.label, step, uri))
            shown.append((prompt, row))
    return shown
