"""The one table of scores: what is measured of a clip, by whom, and which thresholds there are for it.

A new score is a line here (or in a plugin, see plugins.py), the function that measures it, and its threshold in a
config. Ledger, stage table, thresholds, decisions and report follow from the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, Field, dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.data.plugins import offered
from pipelines.errors import UserError


@dataclass(frozen=True)
class Score:
    """One score."""

    name: str  # as ledgers and thresholds have it
    unit: str  # of its values
    _: KW_ONLY
    about: str  # what it says, in words
    # which stage measures it: the pass over all frames ("split"), models ("features"), the tokenizer ("tokens")
    stage: Literal["split", "features", "tokens"] = "split"
    of_time: bool = False  # whether it is about time; an image cannot have enough of that, and is not asked for it
    share: bool = False  # whether it lies in 0..1, so that a threshold beyond makes no sense
    # whether it tells of a damaged file; such a reason is told first, as others may follow from it
    damage: bool = False
    # thresholds that there are, "min" and "max", with their defaults; None: switched off
    bounds: Mapping[str, float | None] = field(default_factory=dict)
    file: str = ""  # config key, below ``features``, of the file that it needs
    # of one small frame of a clip (Y, Cb and Cr, [3, height, width], 0..255), where the clip's score is the mean
    # over its frames; None where ``video/shots.py`` or a model measures otherwise
    measure: Callable[[NDArray[np.uint8]], float] | None = None


_BUILT_IN = (
    Score("image", "0 or 1", about="1 for an image, 0 for a video"),
    Score("duration", "s", about="length of the clip", of_time=True, bounds={"min": None}),
    Score("fps", "1/s", about="frames per second of the source", of_time=True, bounds={"min": 8.0}),
    Score("width", "px", about="of the picture between black bars", bounds={"min": None}),
    Score("height", "px", about="of the picture between black bars", bounds={"min": None}),
    Score("aspect", "width / height", about="shape of the picture", bounds={"min": 0.33, "max": 3.0}),
    Score("picture_share", "share", about="of the frame that lies between black bars", share=True),
    Score("declared_frames", "frames", about="that the file says it has"),
    Score("decoded_frames", "frames", about="that could be decoded"),
    Score(
        "decoded_share",
        "share",
        about="frames decoded of those the file declares: less is a damaged file",
        of_time=True,
        share=True,
        damage=True,
        bounds={"min": 0.95},
    ),
    Score(
        "decode_errors",
        "frames",
        about="in which a decoder has concealed damage, or before which it told of an error: smear, often",
        damage=True,
        bounds={"max": None},
    ),
    Score("brightness", "share", about="mean luma, 0 black, 1 white", share=True, bounds={"min": 0.02, "max": 0.98}),
    Score("dark_share", "share", about="of the frames that are as good as black", share=True, bounds={"max": 0.5}),
    Score(
        "flash_share",
        "share",
        about="of the frames that are much brighter or darker than those around them",
        of_time=True,
        share=True,
        bounds={"max": 0.1},
    ),
    Score(
        "repeat_share",
        "share",
        about="of the frames that show the very picture of the one before",
        of_time=True,
        share=True,
        bounds={"max": None},
    ),
    Score(
        "cut",
        "0..1",
        about="how surely a cut or a transition is left inside, by a second measure than what splits",
        of_time=True,
        share=True,
        bounds={"max": 0.5},
    ),
    Score("freeze", "s", about="longest stretch of such frames", of_time=True, bounds={"max": None}),
    Score(
        "sharpness",
        "variance",
        about="of the Laplacian of the full-size luma, 0..255; depends on contrast",
        bounds={"min": None},
    ),
    Score(
        "plain_share",
        "share",
        about="of the picture at exact levels or even ramps, as test bars, planes, slides and cards of text are",
        share=True,
        bounds={"max": None},
    ),
    Score("noise", "0..1", about="spectral flatness of the picture", share=True, bounds={"max": None}),
    Score(
        "motion",
        "share",
        about="of the picture that changes between looks 1/8 s apart, on average",
        of_time=True,
        share=True,
        bounds={"min": None},
    ),
    # A static camera with a small moving subject has nearly 1, a slide that is turned now and then nearly 0.
    Score(
        "motion_time",
        "share",
        about="of the time in which anything moves",
        of_time=True,
        share=True,
        bounds={"min": 0.25},
    ),
    Score(
        "text_area",
        "share",
        about="of the picture that text covers",
        stage="features",
        share=True,
        bounds={"max": None},
        file="text_detector",
    ),
    Score(
        "aesthetic",
        "1..10",
        about="by LAION's heads; 4.5-5 in the field",
        stage="features",
        bounds={"min": None},
        file="aesthetic_head",
    ),
    Score("nsfw", "0..1", about="as the head gives it", stage="features", bounds={"max": None}, file="nsfw_head"),
    Score(
        "similarity",
        "cosine",
        about="of frames and best caption, -1..1",
        stage="features",
        bounds={"min": None},
        file="clip.weights",
    ),
    Score("psnr", "dB", about="of the decoded codes, of a sample of clips", stage="tokens"),
    Score("ssim", "SSIM", about="of the luma of these, mean over the frames", stage="tokens"),
)
_ADDED: tuple[Score, ...] = offered("SCORES")
for _score in _ADDED:
    if _score.measure is None or _score.stage != "split":
        raise UserError(f"LUMOS_SCORES: the score {_score.name!r} says no measure, which one from a plugin must")
_PASS_FIRST = sorted((*_BUILT_IN, *_ADDED), key=lambda score: score.stage != "split")
SCORES: Mapping[str, Score] = {score.name: score for score in _PASS_FIRST}
if len(SCORES) != len(_PASS_FIRST):
    raise UserError(f"LUMOS_SCORES adds a score of a name that there is already; known: {', '.join(SCORES)}")
# In this order reasons are told; the first names the class that a rejection is counted under.
DECISIVE = tuple(sorted((score for score in SCORES.values() if score.bounds), key=lambda score: not score.damage))


def scores_of(stage: str) -> tuple[Score, ...]:
    """The scores that a stage measures."""
    return tuple(score for score in SCORES.values() if score.stage == stage)


if TYPE_CHECKING:

    class Thresholds:
        """What a clip's scores must be for it to be kept: ``min_`` and ``max_`` of them; none switches one off.

        A change here decodes and computes nothing anew: scores are stored.
        """

        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

        def __init__(self, **bounds: float | None) -> None: ...

else:
    Thresholds = make_dataclass(
        "Thresholds",
        [
            (f"{which}_{score.name}", float | None, field(default=default))
            for score in SCORES.values()
            for which, default in score.bounds.items()
        ],
        frozen=True,
        kw_only=True,
        namespace={"__module__": __name__, "__doc__": "What a clip's scores must be for it to be kept."},
    )
