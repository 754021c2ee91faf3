"""Clips on both sides of each threshold, the nearest to it first: what another value would take in, or leave out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data.scores import Thresholds
from pipelines.data.stage.columns import take
from pipelines.data.steps.decide import bounds

CLIPS_EACH = 6  # on either side


@dataclass(frozen=True)
class Border:
    """The clips nearest to a threshold that rejects some."""

    score: str
    name: str  # of the threshold
    value: float
    outside: list[str]  # keys of rejected clips that it rejects, those first that nothing else does
    inside: list[str]  # keys of kept clips
    total: int  # clips that are outside


def find_borders(ledger: pa.Table, scores: Mapping[str, NDArray[np.float64]], thresholds: Thresholds) -> list[Border]:
    """Of each threshold that rejects something, the clips nearest to it.

    Args:
        ledger: Columns key, status and reason of rows that have scores.
        scores: Of these, an array each, nan where it is null.
        thresholds: That were decided with.
    """
    status = ledger["status"].to_numpy()
    alone = pc.invert(pc.match_substring(ledger["reason"], "; ")).to_numpy()
    of_time = ~(scores["image"] > 0) if "image" in scores else np.ones(len(status), bool)
    found = []
    for score, *pair in bounds(thresholds):
        values = scores.get(score.name)
        for which, sign, limit in zip(("min", "max"), (1, -1), pair, strict=True):
            if values is None or limit is None:
                continue
            room = sign * (values - limit)  # below 0 outside; nan where nobody looked
            counts = of_time if score.of_time else np.ones(len(status), bool)
            outside = np.flatnonzero((room < 0) & (status == "rejected") & counts)
            inside = np.flatnonzero((room >= 0) & (status == "kept") & counts)
            if not len(outside):
                continue
            nearest = np.lexsort((outside, -room[outside], ~alone[outside]))[:CLIPS_EACH]
            within = np.lexsort((inside, room[inside]))[:CLIPS_EACH]
            beyond, kept = (take(ledger["key"], chosen).to_pylist() for chosen in (outside[nearest], inside[within]))
            found.append(Border(score.name, f"{which}_{score.name}", limit, beyond, kept, len(outside)))
    return found
