"""What moves in a clip, apart from what stands still: by it two gestures before one background are told apart.

The luma of 8x8 cells is taken six times a second, less its mean over the picture, its mean over time, and whatever is
the mean picture again, stronger or weaker: a fade and a change of exposure are no movement. A sample takes half a byte,
in steps of half the root mean square, so that a clip of three seconds takes 600 bytes.

All that is added up is whole, so that no CPU and no order of summing changes a bit.
"""

import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.data.video.fingerprint import THUMBNAIL

RATE = 6  # samples of each cell in a second
CELLS = THUMBNAIL * THUMBNAIL
STILL = 0.25  # levels of luma, 0..255: root mean square of all samples, below which nothing moves
MAX_SECONDS = 60.0  # of a clip; in a longer one many pictures are compared, which differ by what moves
_PARTS = CELLS * CELLS  # of a level, in which samples are counted
_TOLD = 256  # parts of a level, in which the root mean square is stored
_LEAST_STEP = _PARTS // 16  # grain is not enlarged
_LARGEST = 7  # steps of a sample, either way

Cells = NDArray[np.uint16]  # [THUMBNAIL, THUMBNAIL], luma times CELLS


def measure_cells(luma: NDArray[np.uint8]) -> Cells:
    """The mean luma of each cell of a small picture, times ``CELLS``."""
    side = CELLS  # px, so that each cell has as many
    fine = np.asarray(cv2.resize(luma, (side, side), interpolation=cv2.INTER_AREA), np.uint16)
    return np.asarray(fine.reshape(THUMBNAIL, THUMBNAIL, THUMBNAIL, THUMBNAIL).sum(axis=(1, 3)), np.uint16)


def make_movement(times: Sequence[float], cells: Sequence[Cells], start: float, end: float) -> bytes:
    """What moves in a span of seconds, packed; empty if it has fewer than two of the pictures, or is too long.

    Args:
        times: Of the pictures, seconds, ascending.
        cells: What ``measure_cells`` gave of each.
        start: Where the span begins.
        end: Where it ends.
    """
    first, stop = (bisect_left(times, moment - 1e-6) for moment in (start, end))
    if stop - first < 2 or end - start > MAX_SECONDS:
        return b""
    seconds = np.array(times[first:stop]) - start
    samples = np.stack(cells[first:stop]).reshape(-1, CELLS).astype(np.float64)
    wanted = np.arange(int(seconds[-1] * RATE + 1e-6) + 1) / RATE
    before = np.clip(np.searchsorted(seconds, wanted, side="right") - 1, 0, len(seconds) - 2)
    share = ((wanted - seconds[before]) / (seconds[before + 1] - seconds[before])).clip(0, 1)[:, None]
    level = np.rint(samples[before] * (1 - share) + samples[before + 1] * share).astype(np.int64)
    centred = CELLS * level - level.sum(axis=1, keepdims=True)
    total = centred.sum(axis=0)  # the mean picture, times the number of samples
    # By how much of the mean picture each is stronger or weaker than it; what is left is movement.
    strength = (centred * total).sum(axis=1) / max(1, int((total * total).sum()))
    moved = np.rint(centred - strength[:, None] * total).astype(np.int64)
    mean_square = float((moved * moved).sum()) / moved.size
    root = min(round(mean_square**0.5 * _TOLD / _PARTS), (1 << 16) - 1)
    steps = np.rint(moved / _step(root)).clip(-_LARGEST, _LARGEST).astype(np.int64).ravel() + 8
    return struct.pack("<H", root) + bytes((steps[::2] << 4 | steps[1::2]).astype(np.uint8))


def _step(root: int) -> int:
    return max(root * _PARTS // _TOLD // 2, _LEAST_STEP)


@dataclass(frozen=True)
class Movement:
    """What moves in a clip, unpacked at need."""

    packed: bytes

    @property
    def is_known(self) -> bool:
        """Whether there are samples at all."""
        return len(self.packed) > 2

    @property
    def is_still(self) -> bool:
        """Whether nothing moves."""
        (root,) = struct.unpack_from("<H", self.packed)
        return int(root) < STILL * _TOLD

    @property
    def samples(self) -> NDArray[np.float64]:
        """Whole numbers, [samples, CELLS], in steps that each clip has of its own."""
        pairs = np.frombuffer(self.packed, np.uint8, offset=2)
        return (np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1, CELLS).astype(np.float64)) - 8
