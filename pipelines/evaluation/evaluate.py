"""The command: every metric of every video of some folders, and what that says of each folder."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.config import provenance
from pipelines.cores import usable_cores
from pipelines.errors import JobError, UserError
from pipelines.evaluation.distances import Features
from pipelines.evaluation.metrics import Metric, Sample, metrics_for
from pipelines.evaluation.models import ModelFiles, Models
from pipelines.evaluation.videos import VideoFile, VideoFolder, read_folder, read_frames, row_keys
from pipelines.statistics import bootstrap_interval

# Of the gallery: videos within the page, beside it, within up to a bound, or no gallery.
Form = Literal["page", "folder", "auto", "none"]
_DISTANCE_DRAWS = 100  # of the bootstrap of a distance between sets, each of which is dear


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, and by what."""

    folders: tuple[str, ...]  # local or s3://, of one model each
    reference: str | None = None  # a folder of real videos, or of the originals of reconstructions
    models: ModelFiles = field(default_factory=ModelFiles)
    out: str | None = None  # folder of results, local or s3://; None: beside the first folder
    gallery: Form = "auto"
    page_mb: float = 40.0  # of videos within the gallery's page, where "auto" is to put them there

    @property
    def output(self) -> str:
        """The folder of results. It is not within a folder of videos, where benchmarks want nothing else to lie."""
        suffix = "comparison" if len(self.folders) > 1 else "evaluation"
        return self.out or f"{self.folders[0].rstrip('/')}-{suffix}"

    def read_folders(self) -> list[VideoFolder]:
        """The videos of each.

        Raises:
            UserError: if one cannot be used, or is named twice.
        """
        labels = folder_labels(self.folders)
        return [read_folder(uri, label) for uri, label in zip(self.folders, labels, strict=True)]


@dataclass(frozen=True, kw_only=True)
class VideoScores:
    """What was measured of one video."""

    file: VideoFile
    values: Mapping[str, float]  # by metric; one that does not apply is left out
    size: tuple[int, int, int]  # frames, height and width; zeros of one that cannot be read
    has_pair: bool = False  # whether there is a reference of its own
    error: str | None = None  # why nothing was measured


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A metric of a set of videos."""

    value: float  # mean over the videos, or the distance of the set
    interval95: tuple[float, float] | None  # by a bootstrap over prompts; None of a single prompt
    videos: int
    prompts: int


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """A folder and what was measured of it."""

    folder: VideoFolder
    videos: tuple[VideoScores, ...]
    figures: Mapping[str, Figure]
    # less those of the first folder, over the prompts and seeds that both have; empty of the first
    differences: Mapping[str, Figure]

    @property
    def failed(self) -> list[VideoScores]:
        """Videos of which nothing could be measured."""
        return [video for video in self.videos if video.error is not None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is told of some folders."""

    config: EvaluateConfig
    metrics: tuple[Metric, ...]  # that some video has
    runs: tuple[RunScores, ...]
    settings: Mapping[str, Any]  # what made it


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure the videos of some folders.

    Raises:
        UserError: if folders or models cannot be used; found before anything is measured.
        JobError: if no video of a folder can be read.
    """
    folders = config.read_folders()
    reference = read_folder(config.reference, "reference") if config.reference is not None else None
    models = Models(config.models)
    metrics = metrics_for(given=set(config.models.given), reference=reference is not None)
    sets = [metric for metric in metrics if metric.distance is not None]
    theirs: dict[str, list[Features]] = {}
    if reference is not None and sets:
        for name, rows in _measure_all(reference, (), sets, models, None)[1].items():
            theirs[name] = [features for _, features in rows]
        if missing := [metric.name for metric in sets if not theirs.get(metric.name)]:
            raise UserError(f"--reference {config.reference} has no video that {missing[0]} can be told from")
    runs: list[RunScores] = []
    for folder in folders:
        videos, features = _measure_all(folder, metrics, sets, models, reference)
        failed = [video for video in videos if video.error is not None]
        if len(failed) == len(videos):
            raise JobError(f"none of the {len(videos)} videos of {folder.uri} can be read: {failed[0].error}")
        figures = {metric.name: _mean(videos, metric.name) for metric in metrics}
        for metric in sets:
            if metric.name in features:
                figures[metric.name] = _distance(metric, features[metric.name], theirs[metric.name])
        known = {name: figure for name, figure in figures.items() if figure is not None}
        differences = _differences(runs[0].videos, videos, metrics) if runs else {}
        runs.append(RunScores(folder=folder, videos=tuple(videos), figures=known, differences=differences))
    return Evaluation(
        config=config,
        metrics=tuple(metric for metric in metrics if any(metric.name in run.figures for run in runs)),
        runs=tuple(runs),
        settings={"config": asdict(config), "models": models.hashes, "provenance": provenance()},
    )


def folder_labels(uris: Sequence[str]) -> list[str]:
    """As little of the end of each path as tells them apart.

    Raises:
        UserError: if a folder is named twice.
    """
    parts = [PurePosixPath(uri.rstrip("/").partition("://")[2] or os.path.abspath(uri)).parts for uri in uris]
    if len(set(parts)) < len(parts):
        raise UserError(f"a folder is named twice: {', '.join(uris)}; name each once")
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


_Rows = dict[str, list[tuple[str, Features]]]  # by metric of sets: the prompt and the features of each video


def _measure_all(
    folder: VideoFolder,
    metrics: Sequence[Metric],
    sets: Sequence[Metric],
    models: Models,
    reference: VideoFolder | None,
) -> tuple[list[VideoScores], _Rows]:
    """Of every video its scores, and of sets the features of their metrics, in the order of the folder."""
    find = _pairing(reference)

    def one(video: VideoFile) -> tuple[VideoScores, dict[str, Features]]:
        pair = find(video)
        try:
            frames, fps = read_frames(video.uri)
            other = read_frames(pair.uri)[0] if pair is not None else None
            sample = Sample(frames, fps, prompt=video.prompt, models=models, reference=other)
            found = {metric.name: metric.measure(sample) for metric in metrics if metric.measure is not None}
            rows = {metric.name: metric.features(sample) for metric in sets if metric.features is not None}
        except (ValueError, OSError, cv2.error) as error:
            why = f"{video.path}: {error}"
            return VideoScores(file=video, values={}, size=(0, 0, 0), has_pair=pair is not None, error=why), {}
        values = {name: float(value) for name, value in found.items() if value is not None}
        size = (len(frames), frames.shape[1], frames.shape[2])
        scores = VideoScores(file=video, values=values, size=size, has_pair=pair is not None)
        return scores, {name: features for name, features in rows.items() if features is not None}

    videos: list[VideoScores] = []
    features: _Rows = {}
    cv2.setNumThreads(1)  # videos are measured side by side, as many as there are cores for
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        measured = pool.map(one, folder.videos)
        total = len(folder.videos)
        for scores, rows in tqdm(measured, folder.label, total=total, unit="video", leave=False, disable=None):
            videos.append(scores)
            for name, own in rows.items():
                features.setdefault(name, []).append((scores.file.prompt, own))
    return videos, features


def _pairing(reference: VideoFolder | None) -> Callable[[VideoFile], VideoFile | None]:
    """What finds a video's reference: that of its prompt and seed, else that of its path without the ending."""
    if reference is None:
        return lambda video: None
    by_prompt = {(video.prompt, video.seed): video for video in reference.videos}
    by_path = {os.path.splitext(video.path)[0]: video for video in reference.videos}
    return lambda video: by_prompt.get((video.prompt, video.seed)) or by_path.get(os.path.splitext(video.path)[0])


def _mean(videos: Sequence[VideoScores], name: str) -> Figure | None:
    """Mean over the videos that a metric applies to."""
    return _figure([(video.file.prompt, video.values[name]) for video in videos if name in video.values])


def _figure(values: Sequence[tuple[str, float]]) -> Figure | None:
    """The mean of values of prompts, with an interval over the prompts."""
    if not values:
        return None
    groups = _groups([prompt for prompt, _ in values])
    count = int(groups.max()) + 1
    numbers = np.array([value for _, value in values])
    sums, members = np.bincount(groups, weights=numbers), np.bincount(groups)
    interval = bootstrap_interval(count, lambda counts: counts @ sums / (counts @ members))
    return Figure(value=float(numbers.mean()), interval95=interval, videos=len(values), prompts=count)


def _distance(metric: Metric, rows: Sequence[tuple[str, Features]], theirs: Sequence[Features]) -> Figure:
    assert metric.distance is not None
    of_video = _groups([prompt for prompt, _ in rows])
    groups = np.repeat(of_video, [len(features) for _, features in rows])
    count = int(groups.max()) + 1
    statistic = metric.distance(np.concatenate([features for _, features in rows]), groups, np.concatenate(theirs))
    value = statistic(np.ones((1, count), np.int64))[0]
    interval = bootstrap_interval(count, statistic, draws=_DISTANCE_DRAWS, centred=True)
    return Figure(value=float(value), interval95=interval, videos=len(rows), prompts=count)


def _groups(prompts: Sequence[str]) -> NDArray[np.int64]:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], np.int64)


def _differences(
    first: Sequence[VideoScores], videos: Sequence[VideoScores], metrics: Sequence[Metric]
) -> dict[str, Figure]:
    """Mean of what each video has more than the first folder's of the same prompt and seed."""
    values = (video.values for video in first)
    before = dict(zip(row_keys(video.file for video in first), values, strict=True))
    keys = row_keys(video.file for video in videos)
    pairs = [(video, before.get(key, {})) for key, video in zip(keys, videos, strict=True)]
    found = {}
    for metric in metrics:
        name = metric.name
        gaps = [
            (video.file.prompt, video.values[name] - other[name])
            for video, other in pairs
            if name in video.values and name in other
        ]
        figure = _figure(gaps)
        if figure is not None:
            found[name] = figure
    return found
