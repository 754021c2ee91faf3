"""Reads colour, background, shape, size and direction from the pixels of a video, without knowing its prompt.

Classical vision against the corpus's own palette and drawings: the background is the paint nearest to most pixels,
the subject is what differs from it, its colour is the nearest paint in CIE Lab, its shape and size are those of the
silhouette that fits best over all sides and places, its direction is the dominant drift of its centre. Accuracy is the
share of videos whose reading equals the prompt's words; chance is the same share after the prompts have been shuffled.

A shape that is right on the whole may flicker. So every frame is read alone too, and a frame whose subject fits no
silhouette well has none: "strict" asks for the right shape in three quarters of the frames.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from statistics import fmean, median

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import uniform_filter

from pipelines.sample_corpus import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, SIDE, SIZES, WORDINGS, ClipSpec, shape_mask
from pipelines.statistics import mean_interval, wilson_interval

ATTRIBUTES = ("color", "background", "shape", "direction", "size")

# Distances are in CIE Lab, where 2 is just visible and white to black is 100.
_OUTLIER = 40.0  # a pixel farther than this from a background says no more against it
_NEAR, _FAR = 14.0, 34.0  # background below, subject above
_MIN_AREA = 0.01  # least share of a frame that can be a subject
_MIN_DRIFT = 0.05  # least drift over the whole video, as a share of the side, that is a direction
_MAX_MISFIT = 0.22  # of a frame's subject that is no silhouette's; a square of four cells without one has 0.25
_STEADY = 0.75  # share of frames that a shape must be seen in to be the video's throughout
_CONSTANT = 0.1  # most relative change of a subject's area that is none to speak of


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the judge sees in one video; "none" where there is no subject or no motion."""

    color: str  # a key of `COLORS`, or "none"
    background: str  # a value of `BACKGROUNDS`
    shape: str  # a value of `SHAPES`, or "none"
    direction: str  # a key of `DIRECTIONS`, or "none"
    size: str  # a key of `SIZES`, or "none"
    # What no prompt asks for in words; equality is of the attributes alone.
    frame_shapes: tuple[str, ...] = field(default=(), compare=False)  # of each frame alone, "none" where none fits well
    area_change: float = field(default=0.0, compare=False)  # standard deviation of the subject's area by its mean

    @property
    def steady_shape(self) -> str:
        """The shape that at least three quarters of the frames show, or "none"; as prompted where there are none."""
        if not self.frame_shapes:
            return self.shape
        shape, frames = Counter(self.frame_shapes).most_common(1)[0]
        return shape if frames >= _STEADY * len(self.frame_shapes) else "none"

    @property
    def is_constant(self) -> bool:
        """Whether there is a subject, and its area hardly changes."""
        return self.shape != "none" and self.area_change <= _CONSTANT

    def strict(self) -> tuple[str, ...]:
        """All five attributes, with the shape that it has throughout."""
        return self.color, self.background, self.direction, self.size, self.steady_shape


_JUDGED: dict[str, Callable[[Reading], object]] = {
    **{name: attrgetter(name) for name in ATTRIBUTES},
    "all": attrgetter("color", "background", "shape", "direction"),
    "strict": Reading.strict,
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy over a set of videos.

    Each mapping has the five attributes, "all" (all but the size right at once, as summaries always had it),
    "shape_frames" (share of frames that show the prompted shape), "strict" (all five right at once, the shape in three
    quarters of the frames) and "constancy" (the subject's area changes by at most a tenth; no prompt has a part in it).
    """

    samples: int  # number of videos
    accuracy: dict[str, float]  # share of videos read as prompted, 0..1
    chance: dict[str, float]  # mean accuracy over all shuffles of the prompts among the same videos, 0..1
    interval95: dict[str, tuple[float, float]]  # Wilson's of shares of videos, Student's of the mean share of frames
    area_change: float  # median over the videos of the relative change of the subject's area; 0 in real clips


def judge_video(frames: NDArray[np.uint8]) -> Reading:
    """Read the attributes of a video.

    Args:
        frames: RGB frames [T, H, W, 3]; square frames of 32 px or more are what the thresholds were tried on.

    Raises:
        ValueError: The array has another shape or type.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected uint8 frames [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    lab = _to_lab(frames)
    background = _nearest_background(lab)
    difference = np.linalg.norm(lab - _to_lab(BACKGROUNDS[background]), axis=-1)
    weight = np.clip((difference - _NEAR) / (_FAR - _NEAR), 0, 1)
    # Without single pixels and the fringes of stripes.
    weight *= uniform_filter(weight, size=(1, 3, 3), mode="nearest") > 0.5
    if weight.mean() < _MIN_AREA:
        return Reading(color="none", background=background, shape="none", direction="none", size="none")
    shape, size, frame_shapes = _silhouettes(weight)
    area = weight.sum(axis=(1, 2))
    return Reading(
        color=_nearest_color(lab, weight),
        background=background,
        shape=shape,
        direction=_direction(weight),
        size=size,
        frame_shapes=frame_shapes,
        area_change=float(area.std() / area.mean()),
    )


def score(readings: Sequence[Reading], prompted: Sequence[Reading]) -> Score:
    """Compare the readings of videos with the attributes in the prompt of each, in the same order."""
    if not readings or len(readings) != len(prompted):
        raise ValueError(f"{len(readings)} readings for {len(prompted)} prompts")
    right, chance = {}, {}
    for name, value in _JUDGED.items():
        seen, asked = [value(reading) for reading in readings], [value(reading) for reading in prompted]
        right[name] = [float(a == b) for a, b in zip(seen, asked, strict=True)]
        chance[name] = _expected_by_shuffling(seen, asked)
    interval = {name: wilson_interval(int(sum(values)), len(values)) for name, values in right.items()}
    right["constancy"] = [float(reading.is_constant) for reading in readings]
    interval["constancy"] = wilson_interval(int(sum(right["constancy"])), len(readings))
    chance["constancy"] = fmean(right["constancy"])
    shares = [
        {shape: reading.frame_shapes.count(shape) / max(1, len(reading.frame_shapes)) for shape in SHAPES}
        for reading in readings
    ]
    right["shape_frames"] = [row[asked.shape] for row, asked in zip(shares, prompted, strict=True)]
    interval["shape_frames"] = mean_interval(right["shape_frames"]) or (0.0, 1.0)
    chance["shape_frames"] = fmean(row[asked.shape] for row, asked in itertools.product(shares, prompted))
    return Score(
        samples=len(readings),
        accuracy={name: fmean(values) for name, values in right.items()},
        chance=chance,
        interval95=interval,
        area_change=median(reading.area_change for reading in readings),
    )


def asked_for_by(spec: ClipSpec) -> Reading:
    """What the caption of a clip asks for."""
    return Reading(
        color=spec.color, background=spec.background, shape=spec.shape, direction=spec.direction, size=spec.size
    )


@functools.cache
def _captions() -> dict[str, Reading]:
    """Every caption of the corpus, and what it asks for."""
    kinds = itertools.product(SHAPES, SIZES, COLORS, BACKGROUNDS, DIRECTIONS)
    readings = [
        Reading(shape=shape, size=size, color=color, background=background, direction=direction)
        for shape, size, color, background, direction in kinds
    ]
    return {
        wording.format(**{name: getattr(reading, name) for name in ATTRIBUTES}): reading
        for wording, reading in itertools.product(WORDINGS, readings)
    }


def asked_for(prompt: str) -> Reading | None:
    """What a prompt asks for, if it is a caption of the corpus."""
    return _captions().get(prompt)


def _expected_by_shuffling(seen: Sequence[object], asked: Sequence[object]) -> float:
    """Mean accuracy over all permutations of `asked`, exactly: each video meets each prompt equally often."""
    seen_counts, asked_counts = Counter(seen), Counter(asked)
    return sum(number * asked_counts[value] for value, number in seen_counts.items()) / len(seen) ** 2


def _nearest_background(lab: NDArray[np.float32]) -> str:
    def cost(name: str) -> float:
        return float(np.minimum(np.linalg.norm(lab - _to_lab(BACKGROUNDS[name]), axis=-1), _OUTLIER).mean())

    return min(BACKGROUNDS, key=cost)


def _nearest_color(lab: NDArray[np.float32], weight: NDArray[np.float32]) -> str:
    # Fringes mix paint and background; the well covered half of the subject is nearly pure paint.
    core = weight >= np.quantile(weight[weight > 0], 0.5)
    seen = np.median(lab[core], axis=0)
    paints = _to_lab(list(COLORS.values()))
    # Blur shifts lightness before it shifts hue, so lightness counts half.
    distance = np.linalg.norm((paints - seen) * np.array([0.5, 1.0, 1.0]), axis=-1)
    return list(COLORS)[int(np.argmin(distance))]


def _to_lab(rgb: ArrayLike) -> NDArray[np.float32]:
    """SRGB 0..255 to CIE Lab under D65."""
    unit = np.asarray(rgb, dtype=np.float32) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def _silhouettes(weight: NDArray[np.float32]) -> tuple[str, str, tuple[str, ...]]:
    """Shape and size of the video's best silhouette, and the shape of every frame by its own, "none" if it fits badly.

    A silhouette has a shape, a size, a side in px, and in each frame the place where it fits best.
    """
    height, width = weight.shape[1:]
    area = weight.sum(axis=(1, 2))
    spectra, energy = np.fft.rfft2(weight), (weight**2).sum(axis=(1, 2))
    kinds, costs, energies = [], [], []
    for shape, size in itertools.product(SHAPES, SIZES):
        for side in _sides(size, min(height, width)):
            template, template_energy = _template(shape, size, side, (height, width))
            overlap = np.fft.irfft2(spectra * template, s=(height, width)).max(axis=(1, 2))
            kinds.append((shape, size))
            costs.append(energy - 2 * overlap + template_energy)
            energies.append(template_energy)
    cost = np.stack(costs)  # [silhouettes, frames]
    best = cost.argmin(axis=0)
    misfit = cost.min(axis=0) / np.maximum(energy, np.array(energies)[best])
    frames = tuple(kinds[i][0] if bad <= _MAX_MISFIT else "none" for i, bad in zip(best, misfit, strict=True))
    # Only frames that hold an average subject: a frame where it is missing says nothing about its shape on the whole.
    return *kinds[int(cost[:, area >= 0.5 * area.mean()].sum(axis=1).argmin())], frames


def _sides(size: str, frame_side: int) -> list[int]:
    """Candidate sides of a size's bounding box in px, up to a sixth smaller or larger than drawn."""
    nominal = SIZES[size] * frame_side / SIDE
    return list(range(max(3, round(nominal * 5 / 6)), round(nominal * 7 / 6) + 1, max(1, frame_side // 48)))


@functools.cache
def _template(shape: str, size: str, side: int, frame: tuple[int, int]) -> tuple[NDArray[np.complex64], float]:
    """Conjugate spectrum of a silhouette at the origin of a frame of (height, width), and its energy."""
    canvas = np.zeros(frame, dtype=np.float32)
    canvas[:side, :side] = shape_mask(shape, size, side)
    return np.conj(np.fft.rfft2(canvas)), float((canvas**2).sum())


def _direction(weight: NDArray[np.float32]) -> str:
    """The dominant axis and sign of the centre's drift, by least squares over the frames that show a subject."""
    count, height, width = weight.shape
    area = weight.sum(axis=(1, 2))
    shown = np.flatnonzero(area >= 0.25 * area.mean())
    if len(shown) < 2:
        return "none"
    y = (weight.sum(axis=2) @ np.arange(height))[shown] / area[shown]
    x = (weight.sum(axis=1) @ np.arange(width))[shown] / area[shown]
    time = shown - shown.mean()
    dy, dx = (float(time @ centre / (time @ time)) * (count - 1) for centre in (y / height, x / width))
    if max(abs(dy), abs(dx)) < _MIN_DRIFT:
        return "none"
    vertical = abs(dy) > abs(dx)
    sign = (round(math.copysign(1, dy)), 0) if vertical else (0, round(math.copysign(1, dx)))
    return next(name for name, move in DIRECTIONS.items() if move == sign)
