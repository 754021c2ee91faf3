"""Where the picture lies in the frame: black bars above and below it, or at its sides, are found to be cut away."""

import cv2
import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # left, top, width, height, px

LOOK_SECONDS = 0.5  # between the full-size frames that are looked at
BAR_LEVEL = 4.0  # mean luma of a bar's row or column at most, 0..255 from black to white
GLOW = 0.06  # of the brightest row: as much may compression add to the rows of a bar next to a bright picture
MAX_BAR = 0.35  # of the height (or width); more is a dark scene
MIN_BARS = 0.02  # of the height (or width), both bars together; less is an encoder's padding, not worth a cut
ASYMMETRY = 0.1  # by which two bars may differ, of the larger one
EDGE = 4  # px by which they may differ in any case


class BorderMeter:
    """Collects, over a whole source, how bright each row and column ever gets.

    Over the whole source, because a dark scene has rows that are black all the time, and a film does not change its
    bars. Where it does, the larger picture counts.
    """

    def __init__(self) -> None:
        self._brightest: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None  # rows and columns
        self._next = 0.0

    def wants(self, time: float) -> bool:
        """Whether the frame of this instant should be added."""
        return time >= self._next

    def add(self, time: float, luma: NDArray[np.uint8]) -> None:
        """Look at a full-size frame: [height, width], 0 black, 255 white."""
        self._next = time + LOOK_SECONDS
        rows = cv2.reduce(luma, 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F).ravel().astype(np.float32)
        columns = cv2.reduce(luma, 0, cv2.REDUCE_AVG, dtype=cv2.CV_32F).ravel().astype(np.float32)
        if self._brightest is None:
            self._brightest = rows, columns
        elif (len(rows), len(columns)) == tuple(map(len, self._brightest)):
            self._brightest = np.maximum(self._brightest[0], rows), np.maximum(self._brightest[1], columns)

    def box(self) -> Box | None:
        """The picture; None if nothing was seen."""
        if self._brightest is None:
            return None
        (top, bottom), (left, right) = map(_bars, self._brightest)
        height, width = map(len, self._brightest)
        return left, top, width - left - right, height - top - bottom


def _bars(levels: NDArray[np.float32]) -> tuple[int, int]:
    """Widths of the black bars at both ends, 0 where there are none to speak of."""
    bright = np.flatnonzero(levels > max(BAR_LEVEL, GLOW * float(levels.max())))
    if not len(bright):
        return 0, 0
    size = len(levels)
    first, last = int(bright[0]), size - 1 - int(bright[-1])
    even = abs(first - last) <= max(EDGE, ASYMMETRY * max(first, last))
    if not even or max(first, last) > MAX_BAR * size or first + last < MIN_BARS * size:
        return 0, 0
    return first, last


def turn_box(box: Box, size: tuple[int, int], rotation: int) -> Box:
    """A box of a picture of ``size`` (width, height), after the picture was turned counter-clockwise by degrees."""
    left, top, width, height = box
    full_width, full_height = size
    if rotation == 90:
        return top, full_width - left - width, height, width
    if rotation == 180:
        return full_width - left - width, full_height - top - height, width, height
    if rotation == 270:
        return full_height - top - height, left, height, width
    return box
