"""An evaluation as text for a terminal and as files: JSON of the figures, a line of JSON for every video."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.amounts import columns
from pipelines.errors import JobError, UserError
from pipelines.evaluation.evaluate import Evaluation, Figure, RunScores
from pipelines.evaluation.metrics import Metric

SCHEMA = 1
FIGURES_FILE, VIDEOS_FILE = "evaluation.json", "videos.jsonl"
_MAX_FAILURES = 5  # told one by one


def as_text(evaluation: Evaluation) -> str:
    """A line per metric: its figure of every folder with its interval, and the difference to the first folder."""
    runs = evaluation.runs
    head = ["metric", "unit"]
    for index, run in enumerate(runs):
        head += [run.folder.label if len(runs) > 1 else "value", "95 % interval"]
        head += [f"less {runs[0].folder.label}"] if index else []
    rows = [[*head, "better"]]
    for metric in evaluation.metrics:
        row = [metric.name, metric.unit]
        for index, run in enumerate(runs):
            figure = run.figures.get(metric.name)
            row += [number(figure), interval(figure)]
            row += [difference_text(run, metric)] if index else []
        rows.append([*row, metric.better or "neither"])
    lines = columns(rows)
    for run in runs:
        prompts = len({video.file.prompt for video in run.videos})
        lines.append(f"{run.folder.label}: {len(run.videos)} videos of {prompts} prompts")
        lines += _reference_lines(evaluation, run)
        lines += [f"  not measured: {video.error}" for video in run.failed[:_MAX_FAILURES]]
        if len(run.failed) > _MAX_FAILURES:
            lines.append(f"  not measured: {len(run.failed) - _MAX_FAILURES} more, see {VIDEOS_FILE}")
    lines.append("Intervals: bootstrap over prompts; they do not tell how another training's seed would do.")
    return "\n".join(lines)


def _reference_lines(evaluation: Evaluation, run: RunScores) -> list[str]:
    """What of a folder was not compared with the reference, and why."""
    reference = evaluation.config.reference
    paired = sum(video.has_pair for video in run.videos)
    if reference is None or paired == len(run.videos):
        return []
    lines = [
        f"  with a reference in {reference} of the same prompt and seed, or the same path: {paired}; psnr, ssim and "
        f"lpips are {'of those alone' if paired else 'left out'}"
    ]
    if not paired and not evaluation.config.models.given.keys() & {"clip", "fvd"}:
        lines.append("  so --reference was of no use: with --clip or --fvd the sets are compared (cmmd, fvd)")
    return lines


def number(figure: Figure | None) -> str:
    """A figure to four digits."""
    return "-" if figure is None else _digits(figure.value)


def interval(figure: Figure | None) -> str:
    """The interval of a figure."""
    if figure is None or figure.interval95 is None:
        return "-"
    return f"{_digits(figure.interval95[0])} to {_digits(figure.interval95[1])}"


def difference_text(run: RunScores, metric: Metric) -> str:
    """How a folder differs from the first, and whether the interval says that it does."""
    figure = run.differences.get(metric.name)
    if figure is None:
        return "-"
    word = verdict(figure, metric)
    return f"{figure.value:+.4g}" + (f" {word}" if word else "")


def verdict(figure: Figure, metric: Metric) -> str:
    """Whether a difference is "better" or "worse", or "differs" where neither is; empty if its interval holds zero."""
    if figure.interval95 is None or figure.interval95[0] <= 0 <= figure.interval95[1]:
        return ""
    if metric.better is None:
        return "differs"
    return "better" if (figure.value > 0) == (metric.better == "higher") else "worse"


def _digits(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """All figures, of which metrics they are, and what made them."""
    return {
        "schema": SCHEMA,
        "metrics": {
            metric.name: {
                "unit": metric.unit,
                "about": metric.about,
                "better": metric.better,
                "range": [metric.low, metric.high],
                "by": metric.by,
            }
            for metric in evaluation.metrics
        },
        "runs": [
            {
                "label": run.folder.label,
                "folder": run.folder.uri,
                "videos": len(run.videos),
                "failed": [video.error for video in run.failed],
                "figures": _figures(run.figures),
                "less_the_first": _figures(run.differences),
                "note": run.folder.note,
            }
            for run in evaluation.runs
        ],
        **evaluation.settings,
    }


def _figures(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {name: asdict(figure) for name, figure in figures.items()}


def begin_results(folder: str) -> None:
    """Make sure that results can be written to a folder, before they are measured; those that it holds stay.

    Nothing is left of the attempt, the folder neither: what comes next may fail.

    Raises:
        UserError: if not.
    """
    probe, missing = storage.join(folder, ".writable"), _missing_folders(folder)
    try:
        storage.write_bytes_atomic(probe, b"")
        storage.remove(probe)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error}): name another folder") from error
    finally:
        for path in missing:
            with suppress(OSError):  # it could not be made, or another process put something into it
                path.rmdir()


def _missing_folders(folder: str) -> list[Path]:
    """A local folder and those above it that are not there, the deepest first."""
    if not storage.is_local(folder):
        return []
    path = Path(storage.filesystem(folder)[1])
    return [each for each in (path, *path.parents) if not each.exists()]


def write_results(folder: str, evaluation: Evaluation) -> None:
    """Write the figures and the scores of every video into a folder, local or on S3.

    Raises:
        JobError: if that cannot be.
    """
    lines = [
        json.dumps(
            {
                "run": run.folder.label,
                "path": video.file.path,
                "prompt": video.file.prompt,
                "seed": video.file.seed,
                "error": video.error,
                **video.values,
            },
            ensure_ascii=False,
        )
        for run in evaluation.runs
        for video in run.videos
    ]
    try:
        storage.write_json_atomic(storage.join(folder, FIGURES_FILE), as_json(evaluation))
        storage.write_bytes_atomic(storage.join(folder, VIDEOS_FILE), "".join(f"{x}\n" for x in lines).encode())
    except OSError as error:
        raise JobError(f"--out {folder} cannot be written ({error}): name another folder") from error
