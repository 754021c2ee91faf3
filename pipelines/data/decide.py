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
    "motion",
    "motion_time",
)


def decide(scores: Mapping[str, float], thresholds: Thresholds) -> tuple[str, str]:
    """Status ("kept" or "rejected") and reason of a clip.

    The reason names each score that is out of bounds, its value and the threshold: "motion_time 0.008 < 0.25".
    """
    reasons = []
    for name in _ORDER:
        low, high = getattr(thresholds, f"min_{name}", None), getattr(thresholds, f"max_{name}", None)
        value = scores[name]
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
