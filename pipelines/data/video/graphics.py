"""What of a picture no camera made: test bars, planes of colour, cards of text and noise, told without a model.

A picture that was drawn has few levels, each of them exact, where those that light leaves run into one another; or it
ramps evenly from one to the next; text is thin strokes on such a ground. Noise has as much of every frequency, where of
a scene the low ones have most.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

_CORE, _AROUND = 1, 6  # levels from one, that are told as it, and that are compared with it
_ALONE = 4.0  # times as frequent as levels around it a level is that stands alone
_REACH = 4  # px of the small picture, over which a ramp is even
_BENT = 2  # levels by which the middle of an even ramp may differ from the mean of its ends, doubled
_STROKE = 7  # px, narrower than which strokes are
_INK = 8  # levels by which a stroke differs from its ground, at least
_SIZE = (64, 36)  # px in which noise is told, so that its grain matters less
_FAINT = 1.0  # variance, of levels, below which there is nothing to tell


def plain_share(luma: NDArray[np.uint8]) -> float:
    """Share of a small picture, [height, width], that shows an exact level, an even ramp, or strokes on one; 0..1."""
    if min(luma.shape) <= 2 * _REACH:
        return 0.0
    counts = np.asarray(cv2.calcHist([luma], [0], None, [256], [0, 256]), np.float32).ravel()
    near, wide = (_sums(counts, reach) for reach in (_CORE, _AROUND))
    core, ring = 2 * _CORE + 1, 2 * (_AROUND - _CORE)
    alone = near * ring > _ALONE * core * (wide - near)
    exact = cv2.LUT(luma, (_sums(alone.astype(np.float32), _CORE) > 0).astype(np.uint8))
    window = np.ones((_STROKE, _STROKE), np.uint8)
    ground = cv2.morphologyEx(cv2.morphologyEx(luma, cv2.MORPH_OPEN, window), cv2.MORPH_CLOSE, window)
    ink = cv2.dilate((cv2.absdiff(luma, ground) > _INK).astype(np.uint8), np.ones((2 * _REACH + 1,) * 2, np.uint8))
    inner = slice(_REACH, -_REACH)
    plain = (
        np.asarray(exact[inner, inner], np.bool_)
        | _is_even(luma)
        | (np.asarray(ink[inner, inner], np.bool_) & _is_even(np.asarray(ground, np.uint8)))
    )
    return float(plain.mean())


def _is_even(luma: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Of each pixel but those at the edges, whether it lies on an even ramp, across and down."""
    values, inner, reach = luma.astype(np.int16), slice(_REACH, -_REACH), 2 * _REACH
    middle = 2 * values[inner, inner]
    across = cv2.absdiff(values[inner, reach:] + values[inner, :-reach], middle) <= _BENT
    down = cv2.absdiff(values[reach:, inner] + values[:-reach, inner], middle) <= _BENT
    return np.asarray(across & down, np.bool_)


def _sums(values: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """Of each place, the sum of the values up to so many places away."""
    return np.asarray(np.convolve(values, np.ones(2 * reach + 1), "same"), np.float32)


def noisiness(luma: NDArray[np.uint8]) -> float:
    """Spectral flatness of a picture, [height, width]: geometric by arithmetic mean of its power, smoothed; 0..1."""
    small = cv2.resize(luma, _SIZE, interpolation=cv2.INTER_AREA).astype(np.float32)
    power = cv2.dct(small - small.mean()) ** 2
    if power.mean() < _FAINT:
        return 0.0
    power = cv2.blur(power, (5, 5)) + 1e-3
    return float(np.exp(np.log(power).mean()) / power.mean())
