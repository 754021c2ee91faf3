"""Writes the demo's report: one self-contained HTML page, videos and charts embedded, that opens from a file."""

import base64
import importlib.resources
import itertools
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from pipelines.demo.charts import Line, line_chart, smooth
from pipelines.demo.judge import Reading, right_or_wrong

TARGETS = {"color": 0.95, "background": 0.95, "direction": 0.75, "shape": 0.60}

_NAMES = {"color": "Colour", "background": "Background", "shape": "Shape", "direction": "Direction", "all": "All four"}
_WINDOW = 21  # steps in a smoothed curve
_MOST_REJECTED = 25  # rows of the ledger shown


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One generated video: its prompt, its file, what was asked for and what the judge read."""

    prompt: str
    seed: int
    video: Path
    asked: Reading
    read: Reading


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """Loss of one training step, in nats per masked visual token; also for each latent frame."""

    step: int
    loss: float
    frames: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One source or clip that was not kept."""

    path: str
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page shows.

    Attributes:
        summary: The content of summary.json.
        samples: All generated videos; those of one prompt stand together.
        losses: The training curve.
        not_kept: Ledger rows whose status is not "kept".
        next_steps: (what it does, command) pairs.
    """

    summary: Mapping[str, Any]
    samples: Sequence[Sample]
    losses: Sequence[LossPoint]
    not_kept: Sequence[LedgerRow]
    next_steps: Sequence[tuple[str, str]] = field(default=())


def write_report(path: Path, report: Report) -> None:
    """Write the page.

    Args:
        path: File to write; replaced if there.
        report: What it shows. The video files must exist; they are copied into the page.
    """
    summary = report.summary
    prompts = [list(group) for _, group in itertools.groupby(report.samples, key=lambda sample: sample.prompt)]
    errors = sum(any(_has_error(sample) for sample in group) for group in prompts)
    loss = [(float(point.step), point.loss) for point in report.losses]
    page = _template().substitute(
        title="Lumos demo: from raw video to generated video",
        subtitle=f"Seed {summary['seed']} · {_minutes(summary['seconds']['total'])} in all · "
        f"peak memory {summary['peak_memory_gb']:.1f} GB",
        lead=escape(_lead(summary, len(prompts))),
        scores="\n".join(_score_row(name, summary) for name in _NAMES),
        error_count=errors,
        prompt_count=len(prompts),
        gallery="\n".join(_prompt_card(group) for group in prompts),
        training=escape(_training(summary["train"])),
        loss_chart=line_chart(
            [
                Line(name="", style="raw", points=loss),
                Line(name="", style="mean", points=smooth(loss, _WINDOW)),
            ],
            title="Training loss by step",
            x_label="step",
            y_label="nats per token",
        ),
        frame_chart=line_chart(
            _frame_lines(report.losses), title="Loss by latent frame", x_label="step", y_label="nats per token"
        ),
        ledger_lead=escape(_ledger_lead(summary["clips"])),
        ledger_counts="".join(_count_row(name, number) for name, number in summary["clips"].items()),
        ledger_rows="".join(_ledger_row(row) for row in report.not_kept[:_MOST_REJECTED]),
        timings=_timings(summary["seconds"]),
        memory=f"Peak memory of the process and all its children, Ray's among them, shared pages counted once: "
        f"{summary['peak_memory_gb']:.2f} GB.",
        next_steps="\n".join(
            f"<p>{escape(text)}</p><pre><code>{escape(command)}</code></pre>" for text, command in report.next_steps
        ),
    )
    path.write_text(page, encoding="utf-8")


def _template() -> string.Template:
    source = importlib.resources.files("pipelines.demo") / "report.html.template"
    return string.Template(source.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------ accuracy


def _lead(summary: Mapping[str, Any], prompts: int) -> str:
    clips, train = summary["clips"], summary["train"]
    return (
        f"{clips['kept']} rendered clips were curated into token shards, a model was trained on them from scratch for "
        f"{train['steps']} steps and served, and {summary['samples']} videos were generated for {prompts} prompts "
        f"whose combination of attributes training never saw. In {summary['accuracy']['all']:.0%} of them all four "
        f"attributes are right at once, against {summary['chance']['all']:.1%} by chance."
    )


def _score_row(name: str, summary: Mapping[str, Any]) -> str:
    value, chance = summary["accuracy"][name], summary["chance"][name]
    low, high = summary["interval95"][name]
    goal = TARGETS.get(name)
    detail = f"{low:.1%} to {high:.1%} · chance {chance:.1%}"
    mark = ""
    if goal is not None:
        verdict = "reached" if value >= goal else "missed"
        detail += f"<br>target {goal:.0%} {verdict}"
        mark = f'<span class="goal" style="left:{100 * goal:.1f}%"></span>'
    return (
        f'<div class="score"><span>{_NAMES[name]}</span><b>{value:.1%}</b>'
        f'<div class="track"><span class="band" style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></span>'
        f'<span class="chance" style="left:{100 * chance:.1f}%"></span>{mark}'
        f'<span class="dot" style="left:{100 * value:.1f}%"></span></div>'
        f'<span class="soft detail">{detail}</span></div>'
    )


# ------------------------------------------------------------------------------------------------------- gallery


def _has_error(sample: Sample) -> bool:
    return not all(right_or_wrong(sample.read, sample.asked).values())


def _prompt_card(group: Sequence[Sample]) -> str:
    style = "card prompt has-error" if any(_has_error(sample) for sample in group) else "card prompt"
    videos = "".join(_video(sample) for sample in group)
    return f'<article class="{style}"><h3>{escape(group[0].prompt)}</h3><div class="pair">{videos}</div></article>'


def _video(sample: Sample) -> str:
    data = base64.b64encode(sample.video.read_bytes()).decode("ascii")
    items = []
    for name, right in right_or_wrong(sample.read, sample.asked).items():
        seen, asked = escape(getattr(sample.read, name)), escape(getattr(sample.asked, name))
        if right:
            items.append(f"<li>{seen}</li>")
        else:
            seen = seen if seen != "none" else f"no {_NAMES[name].lower()}"
            items.append(f'<li class="wrong">{seen}, not {asked}</li>')
    return (
        f'<div><video muted loop playsinline preload="auto" title="{escape(sample.video.name)}" '
        f'src="data:video/mp4;base64,{data}"></video>'
        f'<ul class="read" aria-label="read by the judge, sampling seed {sample.seed}">{"".join(items)}</ul></div>'
    )


# ------------------------------------------------------------------------------------------------------ training


def _training(train: Mapping[str, Any]) -> str:
    return (
        f"{train['steps']} steps at {train['tokens_per_s']:,.0f} tokens/s; the loss fell from "
        f"{train['loss_first']:.2f} to {train['loss_last']:.2f} nats per masked visual token."
    )


def _frame_lines(losses: Sequence[LossPoint]) -> list[Line]:
    count = max((len(point.frames) for point in losses), default=0)
    lines = []
    for frame in range(count):
        points = [(float(point.step), point.frames[frame]) for point in losses if len(point.frames) > frame]
        style = f"frame{min(4, frame * 5 // count)}"
        lines.append(Line(name=f"frame {frame + 1}", style=style, points=smooth(points, _WINDOW)))
    return lines


# ---------------------------------------------------------------------------------------------- ledger and costs


def _ledger_lead(clips: Mapping[str, int]) -> str:
    return (
        f"Every source file and every clip is accounted for. Of {clips['sources']} files, {clips['kept']} clips were "
        "kept; the others, with the bad files that the corpus holds on purpose, are listed with the reason."
    )


def _count_row(name: str, number: int) -> str:
    return f'<tr><td>{escape(name)}</td><td class="number">{number}</td></tr>'


def _ledger_row(row: LedgerRow) -> str:
    return (
        f'<tr><td class="path">{escape(row.path)}</td><td>{escape(row.status)}</td><td>{escape(row.reason)}</td></tr>'
    )


def _timings(seconds: Mapping[str, float]) -> str:
    total = max(seconds["total"], 1e-9)
    rows = []
    for name, value in seconds.items():
        bar = "" if name == "total" else f'<div class="bar" style="width:{100 * value / total:.1f}%"></div>'
        label = f"<b>{escape(name)}</b>" if name == "total" else escape(name)
        rows.append(
            f'<tr><td style="width:130px">{label}</td><td class="number" style="width:90px">{value:.1f} s</td>'
            f'<td style="vertical-align:middle">{bar}</td></tr>'
        )
    return "".join(rows)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
