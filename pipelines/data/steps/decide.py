"""Decisions: from stored scores and thresholds to kept or rejected, with every reason. Pure, so a threshold is free."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data import reasons
from pipelines.data.settings import Thresholds

# In this order reasons are told; the first names the class that a rejection is counted under. Damage comes first, as
# other scores may follow from it.
_ORDER = (
    "decoded_share",
    "duration",
    "fps",
    "width",
    "height",
    "aspect",
    "brightness",
    "dark_share",
    "flash_share",
    "repeat_share",
    "freeze",
    "sharpness",
    "motion",
    "motion_time",
    "text_area",
    "aesthetic",
    "nsfw",
    "similarity",
)
# What an image cannot have enough of, and is not asked for.
_OF_TIME = frozenset(
    ("decoded_share", "duration", "fps", "flash_share", "repeat_share", "freeze", "motion", "motion_time")
)

_SHARES = ("brightness", "motion", "motion_time", "text_area")  # besides those that are called so


def is_share(name: str) -> bool:
    """Whether a score lies in 0..1, so that a threshold beyond makes no sense."""
    return name.endswith("_share") or name in _SHARES


def bounds(thresholds: Thresholds) -> Iterator[tuple[str, float | None, float | None]]:
    """Each score that is decided on, in the order of reasons, with the least and the most it may be."""
    for name in _ORDER:
        yield name, getattr(thresholds, f"min_{name}", None), getattr(thresholds, f"max_{name}", None)


def decide(scores: Mapping[str, float | None], thresholds: Thresholds) -> tuple[str, str]:
    """Status ("kept" or "rejected") and reason of a clip.

    The reason names each score that is out of bounds, its value and the threshold: "motion_time 0.008 < 0.25". A score
    that nobody took (null, or not there) says nothing, and an image is not asked for what only a video has.
    """
    found = []
    for name, low, high in bounds(thresholds):
        value = scores.get(name)
        if value is None or (scores.get("image") and name in _OF_TIME):
            continue
        if low is not None and value < low:
            found.append(reasons.below(name, value, low))
        if high is not None and value > high:
            found.append(reasons.above(name, value, high))
    return ("rejected", reasons.all_of(found)) if found else ("kept", "")


def keeps(scores: Mapping[str, NDArray[np.float64]], thresholds: Thresholds) -> NDArray[np.bool_]:
    """For many clips at once, whether ``decide`` would keep each.

    Args:
        scores: One array per score, all of one length, a row being a clip; nan where a score is null.
        thresholds: What to decide by.
    """
    kept = np.ones(len(next(iter(scores.values()), ())), dtype=bool)
    for name, low, high in bounds(thresholds):
        values = scores.get(name)
        if values is None:
            continue
        if name in _OF_TIME and "image" in scores:
            values = np.where(scores["image"] > 0, np.nan, values)
        if low is not None:
            kept &= ~(values < low)  # not "values >= low", which nan would fail
        if high is not None:
            kept &= ~(values > high)
    return kept


def fills(scores: Mapping[str, NDArray[np.float64]], tokens: Mapping[str, Any]) -> NDArray[np.bool_]:
    """For many clips at once, whether each has the frames of the shortest length that is encoded (``plan_shape``).

    Args:
        scores: As for ``keeps``; of them ``duration`` and ``image``.
        tokens: ``num_frames``, allowed lengths, and ``fps``.
    """
    lengths = tokens["num_frames"]
    shortest = min((count for count in lengths if count > 1), default=math.inf)
    available = np.floor(scores["duration"] * tokens["fps"] + 0.01)
    return np.where(scores["image"] > 0, 1 in lengths, available >= shortest)


def check_complete() -> None:
    """Every threshold must be looked at above.

    Raises:
        AssertionError: if one is not.
    """
    named = {field.name.partition("_")[2] for field in fields(Thresholds)}
    assert named <= set(_ORDER), f"thresholds nobody looks at: {named - set(_ORDER)}"


check_complete()
