"""What the demo's page shows: the generated videos beside what was asked for, how the model learned, what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.demo.judge import Reading, right_or_wrong
from pipelines.pages.plots import Points, line_chart, smooth
from pipelines.pages.render import write_page

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

    @property
    def right(self) -> Mapping[str, bool]:
        """Whether each attribute was read as it was asked for."""
        return right_or_wrong(self.read, self.asked)


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
    """What the page shows."""

    summary: Mapping[str, Any]  # the content of summary.json
    samples: Sequence[Sample]  # all generated videos; those of one prompt stand together
    losses: Sequence[LossPoint]  # the training curve
    not_kept: Sequence[LedgerRow]  # ledger rows whose status is not "kept"
    next_steps: Sequence[tuple[str, str]] = field(default=())  # (what it does, command) pairs


def write_report(path: Path, report: Report) -> None:
    """Write the page.

    Args:
        path: File to write; replaced if there.
        report: What it shows. The video files must exist; they are copied into the page.
    """
    by_prompt = [list(group) for _, group in groupby(report.samples, key=lambda sample: sample.prompt)]
    errors = [any(not all(sample.right.values()) for sample in group) for group in by_prompt]
    labels = {"x_label": "step", "y_label": "nats per token"}
    loss = [(float(point.step), point.loss) for point in report.losses]
    lines = {"each step": loss, "smoothed": smooth(loss, _WINDOW)}
    write_page(
        path,
        "demo_report.html.j2",
        **vars(report),
        prompts=list(zip(by_prompt, errors, strict=True)),
        num_errors=sum(errors),
        names=_NAMES,
        targets=TARGETS,
        most_rejected=_MOST_REJECTED,
        loss_chart=line_chart(lines, title="Training loss by step", faint=["each step"], **labels),
        frame_chart=line_chart(_frame_lines(report.losses), title="Loss by latent frame", **labels),
    )


def _frame_lines(losses: Sequence[LossPoint]) -> dict[str, Points]:
    lines = {}
    for frame in range(max((len(point.frames) for point in losses), default=0)):
        points = [(float(point.step), point.frames[frame]) for point in losses if len(point.frames) > frame]
        lines[f"frame {frame + 1}"] = smooth(points, _WINDOW)
    return lines
