"""Decisions: from stored scores and thresholds to kept or rejected, with every reason. Pure, so a threshold is free."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from pipelines.data import reasons
from pipelines.data.config import FRAME_ROUNDING, TokenConfig
from pipelines.data.scores import DECISIVE, Score, Thresholds


def bounds(thresholds: Thresholds) -> Iterator[tuple[Score, float | None, float | None]]:
    """Each score that is decided on, in the order of reasons, with the least and the most it may be."""
    for score in DECISIVE:
        low, high = (getattr(thresholds, f"{which}_{score.name}", None) for which in ("min", "max"))
        yield score, low, high


def decide(scores: Mapping[str, float | None], thresholds: Thresholds) -> tuple[str, str]:
    """Status ("kept" or "rejected") and reason of a clip.

    The reason names each score that is out of bounds, its value and the threshold: "motion_time 0.008 < 0.25". A score
    that nobody took (null, or not there) says nothing, and an image is not asked for what only a video has.
    """
    found = []
    for score, low, high in bounds(thresholds):
        value = scores.get(score.name)
        if value is None or (scores.get("image") and score.of_time):
            continue
        if low is not None and value < low:
            found.append(reasons.below(score.name, value, low))
        if high is not None and value > high:
            found.append(reasons.above(score.name, value, high))
    return ("rejected", reasons.all_of(found)) if found else ("kept", "")


def keeps(scores: Mapping[str, NDArray[np.float64]], thresholds: Thresholds) -> NDArray[np.bool_]:
    """For many clips at once, whether ``decide`` would keep each: an array per score, nan where a score is null."""
    kept = np.ones(len(next(iter(scores.values()), ())), dtype=bool)
    for score, low, high in bounds(thresholds):
        values = scores.get(score.name)
        if values is None:
            continue
        if score.of_time and "image" in scores:
            values = np.where(scores["image"] > 0, np.nan, values)
        if low is not None:
            kept &= ~(values < low)  # not "values >= low", which nan would fail
        if high is not None:
            kept &= ~(values > high)
    return kept


def fills(scores: Mapping[str, NDArray[np.float64]], tokens: TokenConfig) -> NDArray[np.bool_]:
    """Likewise, whether each has the frames of the shortest length, and the size, that is encoded (``plan_shape``)."""
    images = scores["image"] > 0
    shortest = tokens.shortest_video or math.inf
    available = np.floor(scores["duration"] * tokens.fps + FRAME_ROUNDING)
    filled = np.where(images, 1 in tokens.num_frames, available >= shortest)
    if tokens.max_enlargement is None:
        return filled
    height = scores["height"]
    width, least = scores["aspect"] * height, np.full(len(height), np.inf)
    for wide, high in tokens.frame_sizes:
        least = np.minimum(least, np.maximum(wide / width, high / height))
    return filled & (images | ~(np.round(least, 3) > tokens.max_enlargement))
