"""Whether two clips are copies of one: both what stands still and what moves must be alike.

Where something moves, the two are laid over each other at every shift, at one speed or one a tenth faster, as they are
and mirrored; the best place is where what moves agrees most (movement.py). There the movement must be alike enough, and
the pictures too, though less so than of a still: those of a copy that is cropped or bears a logo are at 0.90 to 0.99,
and so are those of any two gestures before one background. Where nothing moves, or nothing is known of it, as of clips
that were scored by an earlier version, the pictures decide alone, and must be all but equal.

All sums are of whole numbers, so that they are exact on any CPU.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.data.video.fingerprint import DIMENSIONS, STEP_SECONDS, THUMBNAIL
from pipelines.data.video.movement import CELLS, RATE, Movement

MIN_FRAMES = 3  # that must match where nothing moves
FLAT = 2.0  # standard deviation of a thumbnail below which it shows nothing that could be told again
_PARTS = 1 << 20  # of one
_MIN_MOVING_FRAMES = 2
_OVERLAP = 0.5  # of the shorter clip, at least
_LEAST_SAMPLES = 6
_FINE = 10  # parts of a sample
_FASTER = 11  # of these parts; as played at 1.1 of the speed
_CACHED = 512  # tracks that are kept, 40 kB each of a clip of four seconds
_MIRRORED = np.arange(CELLS).reshape(-1, THUMBNAIL)[:, ::-1].ravel()  # columns of samples

# [frames, DIMENSIONS], rows of unit length in whole parts of ``1 / _PARTS``, or zero where flat
Print = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From which cosines on two clips are copies."""

    still: float  # of their pictures, where nothing moves
    moving: float  # likewise, where something does
    motion: float | None  # of what moves; none: the pictures decide alone, as where nothing moves

    @property
    def least(self) -> float:
        """Of pictures, below which no pair needs to be compared."""
        return self.still if self.motion is None else min(self.still, self.moving)


class Appearance:
    """What is known of the pictures of a clip, and of what moves in them."""

    def __init__(self, fingerprint: bytes, movement: bytes | None) -> None:
        self.pictures = unpack_fingerprint(fingerprint)
        self.movement = Movement(movement or b"")

    @property
    def order(self) -> tuple[int, bytes]:
        """In which two clips are compared, whichever comes first."""
        return len(self.movement.packed), self.movement.packed

    def mirrored(self) -> Print:
        """The pictures, left and right exchanged."""
        return self.pictures.reshape(-1, THUMBNAIL, THUMBNAIL, 3)[:, :, ::-1].reshape(-1, DIMENSIONS)


def unpack_fingerprint(data: bytes) -> Print:
    """Unit vectors of a stored fingerprint (uint8 thumbnails, one after another)."""
    pixels = np.frombuffer(data, np.uint8).reshape(-1, DIMENSIONS).astype(np.float64)
    centred = DIMENSIONS * pixels - pixels.sum(axis=1, keepdims=True)  # times the number of pixels
    length = np.sqrt(np.square(centred).sum(axis=1, keepdims=True))
    lively = length > FLAT * np.sqrt(DIMENSIONS) * DIMENSIONS
    return np.where(lively, np.rint(centred / np.maximum(length, 1) * _PARTS), 0)


def likeness(one: Appearance, other: Appearance, limits: Limits) -> float | None:
    """The cosine of the pictures of two clips if they are copies, else None. Their order does not matter."""
    known = limits.motion is not None and one.movement.is_known and other.movement.is_known
    if known and not (one.movement.is_still and other.movement.is_still):
        return _moving_likeness(one, other, limits)
    cosine = similarity(one.pictures, other.pictures)
    if known and cosine < limits.still:
        cosine = similarity(one.pictures, other.mirrored())
    return cosine if cosine >= limits.still else None


def similarity(first: Print, second: Print) -> float:
    """Mean cosine of frames in step, at the best offset of the shorter clip within the longer; 0 if too short.

    Moments at which both are flat say nothing and do not count.
    """
    short, long = sorted((first, second), key=len)
    cosines = short @ long.T
    telling = np.any(short, axis=1, keepdims=True) | np.any(long, axis=1, keepdims=True).T
    best = 0.0
    for offset in range(len(long) - len(short) + 1):
        count = int(np.diagonal(telling, offset).sum())
        if count >= MIN_FRAMES:
            best = max(best, float(np.diagonal(cosines, offset).sum()) / count)
    return best / _PARTS**2


@dataclass(frozen=True)
class _Place:
    """How one clip lies over another."""

    cosine: float  # of what moves
    slope: float  # seconds of the second clip in one of the first
    shift: float  # second at which it is where the first begins


class _Track:
    """Samples of what moves, at every ``step`` from ``phase`` on, both in parts of a sample; and their sums."""

    def __init__(self, samples: NDArray[np.float64], step: int, phase: int) -> None:
        places = np.arange(phase, _FINE * (len(samples) - 1) + 1, step)
        before, share = places // _FINE, (places % _FINE)[:, None]
        after = np.minimum(before + 1, len(samples) - 1)
        self.samples = samples[before] * (_FINE - share) + samples[after] * share  # times the number of parts
        self.totals = np.concatenate([np.zeros((1, CELLS)), np.cumsum(self.samples, axis=0)])
        self.squares = np.concatenate([np.zeros(1), np.cumsum((self.samples * self.samples).sum(axis=1))])

    def mirrored(self) -> "_Track":
        """Left and right exchanged."""
        found = copy(self)
        found.samples, found.totals = self.samples[:, _MIRRORED], self.totals[:, _MIRRORED]
        return found


@lru_cache(_CACHED)
def _track(movement: Movement, step: int, phase: int) -> _Track:
    return _Track(movement.samples, step, phase)


def _moving_likeness(one: Appearance, other: Appearance, limits: Limits) -> float | None:
    if one.order > other.order:
        one, other = other, one
    found: list[tuple[_Place, NDArray[np.float64]]] = []
    for pictures, is_mirrored in ((other.pictures, False), (other.mirrored(), True)):
        cosines = one.pictures @ pictures.T
        if cosines.size and cosines.max() / _PARTS**2 >= limits.moving:  # else no mean of some is
            place = max(_places(one.movement, other.movement, is_mirrored), key=lambda place: place.cosine)
            found.append((place, cosines))
    if not found:
        return None
    place, cosines = max(found, key=lambda each: each[0].cosine)
    if limits.motion is None or place.cosine < limits.motion:
        return None
    cosine = _mean_cosine(cosines, place)
    return cosine if cosine >= limits.moving else None


def _places(one: Movement, other: Movement, is_mirrored: bool) -> Iterator[_Place]:
    """The best place of two clips at each speed, and at each phase of the samples of one."""

    def best(first: _Track, second: _Track) -> tuple[float, int]:
        return _best_offset(first.mirrored() if is_mirrored else first, second)

    for phase in (0, _FINE // 2):
        start = phase / _FINE
        cosine, offset = best(_track(one, _FINE, 0), _track(other, _FINE, phase))
        yield _Place(cosine, 1.0, (offset + start) / RATE)
        cosine, offset = best(_track(one, _FINE, 0), _track(other, _FASTER, phase))
        yield _Place(cosine, _FASTER / _FINE, (offset * _FASTER / _FINE + start) / RATE)
        cosine, offset = best(_track(one, _FASTER, phase), _track(other, _FINE, 0))
        yield _Place(cosine, _FINE / _FASTER, (offset - start * _FINE / _FASTER) / RATE)


def _best_offset(one: _Track, other: _Track) -> tuple[float, int]:
    """The largest cosine of two clips' samples, each less its mean where they overlap, and the offset in the second."""
    length, width = len(one.samples), len(other.samples)
    least = max(_LEAST_SAMPLES, math.ceil(_OVERLAP * min(length, width) - 1e-6))
    offsets = np.arange(least - length, width - least + 1)
    if not len(offsets):
        return 0.0, 0
    starts = np.maximum(0, -offsets), np.maximum(0, offsets)
    count = np.minimum(length - starts[0], width - starts[1])
    # Products of samples in step lie on diagonals of the table of all; skewed, these are its columns.
    table = np.zeros((length, length + width))
    table[:, :width] = one.samples[::-1] @ other.samples.T
    product = count * table.ravel()[:-length].reshape(length, -1).sum(axis=0)[offsets + length - 1]
    means, energies = [], []
    for track, start in zip((one, other), starts, strict=True):
        means.append(track.totals[start + count] - track.totals[start])
        squares = track.squares[start + count] - track.squares[start]
        energies.append(count * squares - np.einsum("ij,ij->i", means[-1], means[-1]))
    product -= np.einsum("ij,ij->i", *means)
    cosines = product / np.sqrt(np.maximum(energies[0] * energies[1], 1.0))
    best = int(np.argmax(cosines))
    return float(cosines[best]), int(offsets[best])


def _mean_cosine(cosines: NDArray[np.float64], place: _Place) -> float:
    """The mean of the cosines of all frames of two clips that are in step there; 0 if these are too few."""
    times = STEP_SECONDS * np.arange(cosines.shape[0])
    frames = np.rint((place.slope * times + place.shift) / STEP_SECONDS).astype(np.int64)
    own = np.flatnonzero((frames >= 0) & (frames < cosines.shape[1]))
    in_step = cosines[own, frames[own]]
    telling = in_step != 0  # the cosine of what is flat is
    return float(in_step[telling].mean()) / _PARTS**2 if telling.sum() >= _MIN_MOVING_FRAMES else 0.0
