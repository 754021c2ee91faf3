"""Reasons: why a row of a ledger was not kept, in words; the one place that writes them and parses them.

    motion_time 0.008 < 0.25; fps 4 < 8      scores out of bounds
    frames 12 < 17 at 12 fps                 fewer frames than the shortest length that is encoded
    enlargement 1.32 > 1: 320x240 to 416x288 at least      a picture smaller than every size that is encoded
    caption: words 2 < 3; language de        no caption that is fit to be used
    near: of KEY (cosine 0.991)              a near-duplicate of a clip
    exact: of SOURCE_ID                      a file with the content of another
    removed: taken out of the dataset        a source that was taken out
    override: NOTE (REASON)                  a person rejected the clip, or kept it though REASON says no
    decode_error (transient): detail         a failure, and whether another try may help

Ledgers are published, so the texts must not change.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.decoding.errors import VideoError

REMOVED = "removed: taken out of the dataset"
OVERRIDE = "override: "  # begins the reason of a clip that a person decided about
CANNOT_BE_KEPT = "override: cannot be kept"  # told beside the reason of a clip that has nothing to encode
CLASSES = ("transient", "permanent")  # of failures

_NO_NOTE = "by hand"
_DUPLICATE = re.compile(r"(near|exact): of (\S+)")


@dataclass(frozen=True)
class Failure:
    """Why something could not be computed; ``str`` of it is the reason."""

    code: str  # class of the failure, one word
    detail: str  # what depends on the input only
    transient: bool = field(kw_only=True)  # whether another try may help

    @property
    def kind(self) -> str:
        """Code and class, by which failures are counted: "decode_error (transient)"."""
        return f"{self.code} ({self.failure_class})"

    @property
    def failure_class(self) -> str:
        """One of ``CLASSES``."""
        return CLASSES[0] if self.transient else CLASSES[1]

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def reason_of(error: VideoError) -> str:
    """As the ledger tells why a file yields no usable video."""
    return str(Failure(error.code, error.detail, transient=error.transient))


def parse_failure(reason: str) -> Failure:
    """The failure that a reason tells; what no failure wrote counts as permanent."""
    kind, _, detail = reason.partition(": ")
    code, _, failure_class = kind.partition(" (")
    return Failure(code, detail, transient=failure_class == f"{CLASSES[0]})")


def below(score: str, value: float, least: float) -> str:
    """Why a clip with a score below its threshold is rejected."""
    return f"{score} {value:.4g} < {least:.4g}"


def above(score: str, value: float, most: float) -> str:
    """Why a clip with a score above its threshold is rejected."""
    return f"{score} {value:.4g} > {most:.4g}"


def all_of(reasons: Sequence[str]) -> str:
    """Several reasons as one; the first names its class."""
    return "; ".join(reasons)


def too_few_frames(count: int, least: int, fps: float) -> str:
    """Why a clip is rejected that has fewer frames, at the rate that is encoded, than the shortest length allowed."""
    return f"frames {count} < {least} at {fps:g} fps"


def too_small(factor: float, most: float, picture: tuple[int, int], size: tuple[int, int]) -> str:
    """Why a clip is rejected whose picture (width, height) would have to be enlarged by more than is allowed.

    ``size`` is that of the sizes that are encoded which it comes nearest to filling.
    """
    (width, height), (wide, high) = picture, size
    return f"enlargement {factor:.4g} > {most:g}: {width}x{height} to {wide}x{high} at least"


def near_duplicate(key: str, cosine: float) -> str:
    """Why a near-duplicate of the clip ``key`` is not kept."""
    return f"near: of {key} (cosine {cosine:.3f})"


def exact_duplicate(source_id: str) -> str:
    """Why a file that repeats the content ``source_id`` has no clips of its own."""
    return f"exact: of {source_id}"


def parse_duplicate(reason: str) -> tuple[str, str] | None:
    """What a row is a duplicate of: "near" and a clip's key, or "exact" and a source_id; None if it is none."""
    match = _DUPLICATE.match(reason)
    return (match[1], match[2]) if match else None


def overridden(note: str, instead: Sequence[str] = ()) -> str:
    """That a person decided about a clip, and what would have kept it out if it was kept."""
    return f"{OVERRIDE}{note or _NO_NOTE}" + (f" ({all_of(instead)})" if instead else "")


def parse_override(reason: str, *, kept: bool) -> str | None:
    """The note of a person's decision that a reason tells, None if it tells of none."""
    if not reason.startswith(OVERRIDE):
        return None
    note = reason.removeprefix(OVERRIDE)
    note = note.partition(" (")[0] if kept else note
    return "" if note == _NO_NOTE else note


def originals_of(reason: str) -> list[str]:
    """Keys and source_ids that a reason names as what a clip or file is a duplicate of."""
    return [match[2] for match in _DUPLICATE.finditer(reason)]


def with_names(reason: str, names: Mapping[str, str]) -> str:
    """A reason that calls what it names as originals by other names, where there are some."""
    return _DUPLICATE.sub(lambda match: f"{match[1]}: of {names.get(match[2], match[2])}", reason)


def too_few_words(count: int, least: int) -> str:
    """Why a caption is not used that has too few words."""
    return f"words {count} < {least}"


def too_many_words(count: int, most: int) -> str:
    """Why a caption is not used that has too many words."""
    return f"words {count} > {most}"


def other_language(language: str) -> str:
    """Why a caption is not used that is in a language not asked for."""
    return f"language {language}"


def caption_fault_kind(fault: str) -> str:
    """What captions are counted by that are not used: the rule they break, such as "words < 3" or "language de"."""
    return re.sub(r"^words \d+ ", "words ", fault)


def no_caption(faults: Sequence[str]) -> str:
    """Why a clip is rejected without a caption that is fit to be used, given the faults of those it has."""
    return f"caption: {all_of(faults) or 'none'}"


def reason_classes(reasons: pa.ChunkedArray) -> pa.ChunkedArray:
    """What each reason is about: the score that it names first, the kind of duplicate, or the code of the failure."""
    return pc.utf8_rtrim(pc.replace_substring_regex(reasons, pattern="(?s) .*", replacement=""), ":")
