"""What the demo's page shows: the generated videos beside what was asked for, how the model learned, what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.demo.judge import Reading, right_or_wrong
from pipelines.pages.plots import Points, line_chart, smooth
from pipelines.pages.render import write_page
from pipelines.training.record import StepRecord

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


def write_report(
    path: Path,
    *,
    summary: Mapping[str, Any],
    samples: Sequence[Sample],
    records: Sequence[StepRecord],
    not_kept: Sequence[Mapping[str, str]],
    next_steps: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page.

    Args:
        path: File to write; replaced if there.
        summary: The content of summary.json.
        samples: All generated videos, whose files are copied into the page; those of one prompt stand together.
        records: The training curve.
        not_kept: Path, status and reason of the ledger's rows whose status is not "kept".
        next_steps: (what it does, command) pairs.
    """
    by_prompt = [list(group) for _, group in groupby(samples, key=lambda sample: sample.prompt)]
    errors = [any(not all(sample.right.values()) for sample in group) for group in by_prompt]
    labels = {"x_label": "step", "y_label": "nats per token"}
    loss = [(float(row.step), row.loss) for row in records]
    lines = {"each step": loss, "smoothed": smooth(loss, _WINDOW)}
    write_page(
        path,
        "demo_report.html.j2",
        summary=summary,
        not_kept=not_kept,
        next_steps=next_steps,
        prompts=list(zip(by_prompt, errors, strict=True)),
        num_errors=sum(errors),
        names=_NAMES,
        targets=TARGETS,
        most_rejected=_MOST_REJECTED,
        loss_chart=line_chart(lines, title="Training loss by step", faint=["each step"], **labels),
        frame_chart=line_chart(_frame_lines(records), title="Loss by latent frame", **labels),
    )


def _frame_lines(records: Sequence[StepRecord]) -> dict[str, Points]:
    lines = {}
    for frame in range(max((len(row.frame_losses) for row in records), default=0)):
        points = [(float(row.step), row.frame_losses[frame]) for row in records if len(row.frame_losses) > frame]
        lines[f"frame {frame + 1}"] = smooth(points, _WINDOW)
    return lines
