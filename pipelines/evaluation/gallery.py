"""The gallery: videos beside prompts and scores, as one page that holds them or as a page with a folder of them."""

import base64
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.errors import JobError
from pipelines.evaluation.evaluate import Evaluation, RunScores, VideoScores
from pipelines.evaluation.judge import ATTRIBUTES
from pipelines.evaluation.results import difference_text, interval, number
from pipelines.evaluation.videos import row_keys
from pipelines.pages.render import render_page

PAGE, VIDEOS = "gallery.html", "gallery-videos"
_TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/mp4", ".mkv": "video/webm", ".avi": "video/avi"}
_VERDICTS = {f"judge_{name}": name for name in (*ATTRIBUTES, "constancy")}
_PICTURES = {".gif": "image/gif", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Gallery:
    """One that was written."""

    page: str  # path or URI
    whole: bool  # whether the page holds the videos


def write_gallery(folder: str, evaluation: Evaluation) -> Gallery:
    """Write the gallery into a folder, local or on S3, in the form that the config says.

    Raises:
        JobError: if it cannot be written.
    """
    form, limit = evaluation.config.gallery, evaluation.config.page_mb * 1e6
    try:
        contents = None if form == "folder" else _contents(evaluation, None if form == "page" else limit)
        storage.remove(storage.join(folder, VIDEOS))
        rows: dict[tuple[str, int, int], dict[str, Any]] = {}
        for index, run in enumerate(evaluation.runs):
            for place, (key, video) in enumerate(zip(row_keys(v.file for v in run.videos), run.videos, strict=True)):
                cell = _cell(evaluation, video)
                empty = {"prompt": key[0], "seed": key[1], "cells": [None] * len(evaluation.runs)}
                rows.setdefault(key, empty)["cells"][index] = cell
                if video.error is not None:
                    continue
                if contents is not None:
                    media = _TYPES.get(_suffix(video), _PICTURES.get(_suffix(video), "video/mp4"))
                    data = base64.b64encode(contents[video.file.uri]).decode("ascii")
                    cell["src"] = f"data:{media};base64,{data}"
                else:
                    cell["src"] = f"{VIDEOS}/{index}/{place:06d}{_suffix(video)}"
                    _place(video.file.uri, storage.join(folder, cell["src"]))
        page = storage.join(folder, PAGE)
        storage.write_bytes_atomic(page, _render(evaluation, list(rows.values())).encode())
    except OSError as error:
        raise JobError(f"the gallery cannot be written to {folder} ({error}): name another folder by --out") from error
    return Gallery(page, contents is not None)


def _contents(evaluation: Evaluation, limit: float | None) -> dict[str, bytes] | None:
    """The bytes of all videos; None if they are more than the limit."""
    contents: dict[str, bytes] = {}
    size = 0
    for run in evaluation.runs:
        for video in run.videos:
            if video.error is None:
                contents[video.file.uri] = storage.read_bytes(video.file.uri)
                size += len(contents[video.file.uri])
                if limit is not None and size > limit:
                    return None
    return contents


def _place(uri: str, target: str) -> None:
    """Put a video beside the page: without taking more room where both are on one disk."""
    if not (storage.is_local(uri) and storage.is_local(target)):
        storage.write_bytes_atomic(target, storage.read_bytes(uri))
        return
    source, path = storage.filesystem(uri)[1], Path(storage.filesystem(target)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, path)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, path)


def _suffix(video: VideoScores) -> str:
    return os.path.splitext(video.file.path)[1].lower()


def _cell(evaluation: Evaluation, video: VideoScores) -> dict[str, Any]:
    """What the page's script shows of one video."""
    names = [metric.name for metric in evaluation.metrics if metric.measure is not None]
    return {
        "path": video.file.path,
        "error": video.error,
        "size": video.size,
        "picture": _suffix(video) in _PICTURES,
        "values": [_rounded(video.values.get(name)) for name in names],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _render(evaluation: Evaluation, rows: list[dict[str, Any]]) -> str:
    runs = evaluation.runs
    shown = [metric for metric in evaluation.metrics if metric.measure is not None]
    data = {
        "runs": [run.folder.label for run in runs],
        "metrics": [
            {
                "words": metric.name.replace("_", " "),
                "unit": metric.unit,
                "about": metric.about,
                "better": metric.better,
                # what a video got wrong stands below it, by this word
                "verdict": _VERDICTS.get(metric.name),
            }
            for metric in shown
        ],
        "rows": rows,
    }
    table = [
        (
            metric,
            [
                (number(run.figures.get(metric.name)), interval(run.figures.get(metric.name)), _difference(run, metric))
                for run in runs
            ],
        )
        for metric in evaluation.metrics
    ]
    return render_page(
        "gallery.html.j2",
        data=data,
        runs=runs,
        table=table,
        videos=sum(len(run.videos) for run in runs),
        prompts=len({row["prompt"] for row in rows}),
        failed=[video.error for run in runs for video in run.failed],
    )


def _difference(run: RunScores, metric: Any) -> str | None:
    return difference_text(run, metric) if run.differences else None
