"""Decisions: from stored scores and thresholds to kept or rejected, with every reason. Pure, so a threshold is free."""

from collections.abc import Mapping
from dataclasses import fields

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


def decide(scores: Mapping[str, float | None], thresholds: Thresholds) -> tuple[str, str]:
    """Status ("kept" or "rejected") and reason of a clip.

    The reason names each score that is out of bounds, its value and the threshold: "motion_time 0.008 < 0.25". A score
    that nobody took says nothing, and an image is not asked for what only a video has.
    """
    reasons = []
    for name in _ORDER:
        value = scores.get(name)
        if value is None or (scores.get("image") and name in _OF_TIME):
            continue
        low, high = getattr(thresholds, f"min_{name}", None), getattr(thresholds, f"max_{name}", None)
        if low is not None and value < low:
            reasons.append(f"{name} {value:.4g} < {low:.4g}")
        if high is not None and value > high:
            reasons.append(f"{name} {value:.4g} > {high:.4g}")
    return ("rejected", "; ".join(reasons)) if reasons else ("kept", "")


def check_complete() -> None:
    """Every threshold must be looked at above.

    Raises:
        AssertionError: if one is not.
    """
    named = {field.name.partition("_")[2] for field in fields(Thresholds)}
    assert named <= set(_ORDER), f"thresholds nobody looks at: {named - set(_ORDER)}"


check_complete()
