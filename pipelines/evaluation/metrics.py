"""The one table of metrics: what is measured of generated videos, in which unit, which way is better, by what.

A new metric is a line here and the function that measures it. Results, intervals, the terminal's table, MLflow and the
gallery follow from the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.data.video.fingerprint import small_size
from pipelines.data.video.meter import FrameMeter
from pipelines.evaluation import judge
from pipelines.evaluation.distances import Distance, cmmd, frechet
from pipelines.media import psnr, ssim

if TYPE_CHECKING:
    from pipelines.evaluation.models import Models

Source = Literal["pixels", "judge", "clip", "lpips", "fvd"]
_SMALL = 256  # px of the longer side of the picture that motion is looked for in, as curation does by default


class Sample:
    """One video as metrics see it; what several of them need is worked out once."""

    def __init__(
        self,
        frames: NDArray[np.uint8],
        fps: float,
        *,
        prompt: str = "",
        models: "Models | None" = None,
        reference: NDArray[np.uint8] | None = None,
    ) -> None:
        self.frames, self.fps, self.prompt = frames, fps, prompt
        self._models, self._reference = models, reference

    @cached_property
    def scores(self) -> Mapping[str, float]:
        """What curation measures of a clip, by the same code; motion over a single frame does not exist."""
        meter = FrameMeter()
        size = small_size(self.frames.shape[2], self.frames.shape[1], _SMALL)
        for index, frame in enumerate(self.frames):
            small = cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2YCrCb)
            planes = np.ascontiguousarray(small[..., [0, 2, 1]].transpose(2, 0, 1), np.uint8)
            meter.add(index / self.fps, planes)
            luma = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)
            meter.add_picture(index / self.fps, luma, planes[0])
        return meter.clip_scores(0, len(self.frames))

    @cached_property
    def judged(self) -> Mapping[str, float]:
        """What the demo's judge says of it, 0..1; empty of prompts that are not the demo's."""
        asked = judge.asked_for(self.prompt)
        return {} if asked is None else judge.score([judge.judge_video(self.frames)], [asked]).accuracy

    @cached_property
    def clip_frames(self) -> NDArray[np.float32]:
        """CLIP features of unit length of frames evenly spread."""
        return self.models.clip_frames(self.frames)

    @property
    def models(self) -> "Models":
        """Those that were given."""
        assert self._models is not None
        return self._models

    @property
    def pair(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
        """The frames that it and its reference have in common; None where it has no reference.

        Raises:
            ValueError: if they are of different sizes.
        """
        if self._reference is None:
            return None
        if self._reference.shape[1:] != self.frames.shape[1:]:
            ours, theirs = (f"{x.shape[2]}x{x.shape[1]}" for x in (self.frames, self._reference))
            raise ValueError(f"it is {ours}, its reference {theirs} px: make both of one size")
        count = min(len(self.frames), len(self._reference))
        return self.frames[:count], self._reference[:count]


@dataclass(frozen=True)
class Metric:
    """One metric, of each video (``measure``) or of a whole set against another (``features`` and ``distance``)."""

    name: str  # as results, MLflow and the gallery have it
    unit: str
    about: str  # what it says, in words
    _: KW_ONLY
    by: Source  # who computes it: pixels alone, or the model that must be given
    better: Literal["higher", "lower"] | None = "higher"  # None: neither is
    low: float | None = 0.0  # the least and the greatest value that it can have
    high: float | None = 1.0
    reference: bool = False  # whether it compares with videos of a reference folder
    measure: Callable[[Sample], float | None] | None = None  # None of a video that it does not apply to
    features: Callable[[Sample], NDArray[np.float32] | None] | None = None  # rows of a video
    distance: Distance | None = None


def temporal_flickering(sample: Sample) -> float | None:
    """VBench's score: (255 - mean absolute difference of successive frames) / 255.

    Means are taken in single precision over blue, green and red, of a pair of frames and then of pairs, as there; so
    equal pixels give the same bits.
    """
    if len(sample.frames) < 2:
        return None
    gaps = (cv2.absdiff(before, after)[..., ::-1] for before, after in pairwise(sample.frames))
    steps = np.array([np.mean(np.ascontiguousarray(gap, np.float32)) for gap in gaps])
    return (255.0 - float(np.mean(steps))) / 255.0


def frame_consistency(sample: Sample) -> float | None:
    """Mean SSIM of successive frames."""
    steps = [ssim(a, b) for a, b in pairwise(sample.frames)]
    return float(np.mean(steps)) if steps else None


def clip_consistency(sample: Sample) -> float | None:
    """Mean cosine of the CLIP features of successive frames, of those that are looked at."""
    features = sample.clip_frames
    return float(np.mean(np.sum(features[:-1] * features[1:], axis=1))) if len(features) > 1 else None


def clip_similarity(sample: Sample) -> float | None:
    """Mean cosine of frames and prompt."""
    return float(np.mean(sample.clip_frames @ sample.models.clip_text(sample.prompt))) if sample.prompt else None


def _of_clip(name: str) -> Callable[[Sample], float | None]:
    return lambda sample: sample.scores[name] if len(sample.frames) > 1 else None


def _static(sample: Sample) -> float | None:
    return 1 - sample.scores["motion_time"] if len(sample.frames) > 1 else None


def _judged(name: str) -> Callable[[Sample], float | None]:
    return lambda sample: sample.judged.get(name)


def _psnr(sample: Sample) -> float | None:
    return psnr(*sample.pair) if sample.pair else None


def _ssim(sample: Sample) -> float | None:
    return float(np.mean([ssim(a, b) for a, b in zip(*sample.pair, strict=True)])) if sample.pair else None


def _lpips(sample: Sample) -> float | None:
    return sample.models.lpips(*sample.pair) if sample.pair else None


_TABLE = (
    *(
        Metric(f"judge_{name}", "share", about, by="judge", measure=_judged(name))
        for name, about in {
            "strict": "of videos with all five attributes as prompted, the shape in three quarters of the frames",
            "all": "of videos with colour, background, shape and direction as prompted",
            **{name: f"of videos whose {name} is as prompted" for name in judge.ATTRIBUTES},
            "shape_frames": "of frames that show the prompted shape",
            "constancy": "of videos whose subject keeps its area to a tenth",
        }.items()
    ),
    Metric("clip_similarity", "cosine", "of frames and prompt", by="clip", low=-1.0, measure=clip_similarity),
    Metric(
        "temporal_flickering",
        "share",
        "VBench's: 1 less the change between frames; motion lowers it too",
        by="pixels",
        measure=temporal_flickering,
    ),
    Metric("frame_consistency", "SSIM", "of successive frames", by="pixels", low=-1.0, measure=frame_consistency),
    Metric("clip_consistency", "cosine", "of successive frames", by="clip", low=-1.0, measure=clip_consistency),
    Metric(
        "motion",
        "share",
        "of the picture that changes within 1/8 s",
        by="pixels",
        better=None,
        measure=_of_clip("motion"),
    ),
    Metric("static_share", "share", "of the time in which nothing moves", by="pixels", better=None, measure=_static),
    Metric(
        "sharpness",
        "variance",
        "of the Laplacian of luma, 0..255; noise raises it too",
        by="pixels",
        high=None,
        measure=lambda sample: sample.scores["sharpness"],
    ),
    Metric("psnr", "dB", "against the reference of each video", by="pixels", high=99.0, reference=True, measure=_psnr),
    Metric("ssim", "SSIM", "against the reference", by="pixels", low=-1.0, reference=True, measure=_ssim),
    Metric(
        "lpips",
        "distance",
        "perceptual, against the reference",
        by="lpips",
        better="lower",
        high=None,
        reference=True,
        measure=_lpips,
    ),
    Metric(
        "cmmd",
        "distance",
        "of the CLIP features of frames to those of the reference set",
        by="clip",
        better="lower",
        low=None,
        high=None,
        reference=True,
        features=lambda sample: sample.clip_frames,
        distance=cmmd,
    ),
    Metric(
        "fvd",
        "distance",
        "Frechet, of the videos' I3D features to those of the reference set",
        by="fvd",
        better="lower",
        high=None,
        reference=True,
        features=lambda sample: sample.models.video_features(sample.frames),
        distance=frechet,
    ),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}


def metrics_for(*, given: set[str], reference: bool) -> tuple[Metric, ...]:
    """The metrics that can be measured with these models, with or without a reference folder."""
    known = {"pixels", "judge", *given}
    return tuple(metric for metric in _TABLE if metric.by in known and (reference or not metric.reference))
