"""Reads colour, background, shape and direction from the pixels of a video, without knowing its prompt.

Classical vision against the corpus's own palette and drawings: the background is the paint nearest to most pixels,
the subject is what differs from it, its colour is the nearest paint in CIE Lab, its shape the silhouette that fits best
over all sizes and places, its direction the dominant drift of its centre. Accuracy is the share of videos whose reading
equals the prompt's words; chance is the same share after the prompts have been shuffled.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import uniform_filter

from pipelines.sample_corpus import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, SIDE, SIZES, WORDINGS, shape_mask
from pipelines.statistics import wilson_interval

ATTRIBUTES = ("color", "background", "shape", "direction")

# Distances are in CIE Lab, where 2 is just visible and white to black is 100.
_OUTLIER = 40.0  # a pixel farther than this from a background says no more against it
_NEAR, _FAR = 14.0, 34.0  # background below, subject above
_MIN_AREA = 0.01  # least share of a frame that can be a subject
_MIN_DRIFT = 0.05  # least drift over the whole video, as a share of the side, that is a direction


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the judge sees in one video; "none" where there is no subject or no motion."""

    color: str  # a key of `COLORS`, or "none"
    background: str  # a value of `BACKGROUNDS`
    shape: str  # a value of `SHAPES`, or "none"
    direction: str  # a key of `DIRECTIONS`, or "none"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy over a set of videos; each mapping has the four attributes and "all" (all four right at once)."""

    samples: int  # number of videos
    accuracy: dict[str, float]  # share of videos read as prompted, 0..1
    chance: dict[str, float]  # mean accuracy over all shuffles of the prompts among the same videos, 0..1
    interval95: dict[str, tuple[float, float]]  # Wilson score interval of the accuracy, videos taken as independent


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
        return Reading(color="none", background=background, shape="none", direction="none")
    return Reading(
        color=_nearest_color(lab, weight),
        background=background,
        shape=_nearest_shape(weight),
        direction=_direction(weight),
    )


def score(readings: Sequence[Reading], prompted: Sequence[Reading]) -> Score:
    """Compare the readings of videos with the attributes in the prompt of each, in the same order."""
    if not readings or len(readings) != len(prompted):
        raise ValueError(f"{len(readings)} readings for {len(prompted)} prompts")
    count = len(readings)
    accuracy, chance, interval = {}, {}, {}
    for name in (*ATTRIBUTES, "all"):
        seen, asked = (
            [reading if name == "all" else getattr(reading, name) for reading in row] for row in (readings, prompted)
        )
        right = sum(a == b for a, b in zip(seen, asked, strict=True))
        accuracy[name] = right / count
        chance[name] = _expected_by_shuffling(seen, asked)
        interval[name] = wilson_interval(right, count)
    return Score(samples=count, accuracy=accuracy, chance=chance, interval95=interval)


@functools.cache
def _captions() -> dict[str, Reading]:
    """Every caption of the corpus, and what it asks for."""
    return {
        wording.format(shape=shape, size=size, color=color, background=background, direction=direction): Reading(
            color=color, background=background, shape=shape, direction=direction
        )
        for wording, shape, size, color, background, direction in itertools.product(
            WORDINGS, SHAPES, SIZES, COLORS, BACKGROUNDS, DIRECTIONS
        )
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


def _nearest_shape(weight: NDArray[np.float32]) -> str:
    """The shape whose silhouette, at the best size for the video and the best place in each frame, fits best."""
    height, width = weight.shape[1:]
    # Only frames that hold an average subject: a frame where it is missing says nothing about its shape.
    areas = weight.sum(axis=(1, 2))
    spectra = np.fft.rfft2(weight[areas >= 0.5 * areas.mean()])
    energy = float((weight[areas >= 0.5 * areas.mean()] ** 2).sum())
    costs: dict[str, float] = {}
    for shape, size in itertools.product(SHAPES, SIZES):
        for side in _sides(size, min(height, width)):
            template, template_energy = _template(shape, size, side, (height, width))
            overlap = np.fft.irfft2(spectra * template, s=(height, width)).max(axis=(1, 2))
            cost = energy - 2 * float(overlap.sum()) + len(spectra) * template_energy
            costs[shape] = min(costs.get(shape, math.inf), cost)
    return min(costs, key=lambda name: costs[name])


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
