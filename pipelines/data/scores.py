"""What is measured of every frame in the low-resolution pass, and what that says of a span of frames.

Everything is measured on decoded pixels, so it does not depend on the codec.

Motion is looked for between frames 1/8 s apart, in 8x8 px blocks of the small picture: a block has changed if its mean
absolute difference, in luma or in chroma, exceeds what compression does to a still picture. ``motion`` is the mean
share of changed blocks, which a moving camera drives up. ``motion_time`` is the share of looks with any changed block:
it tells a static camera with a small moving subject (always something moves) from a still shot or a slide that is
turned now and then (nothing moves most of the time).
"""

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

LOOK_SECONDS = 1 / 8
BLOCK = 8  # px
BLOCK_CHANGE = 4.0  # mean absolute difference of a block's luma, 0..255; grain and usual compression stay below
CHROMA_CHANGE = 12.0  # likewise of Cb or Cr, in which codecs save most
DARK_PIXEL = 32  # luma, 0..255
DARK_FRAME = 0.01  # share of brighter pixels that a frame may have and still count as black


@dataclass
class FrameMeter:
    """Collects measurements frame by frame, about 50 bytes each."""

    times: list[float] = field(default_factory=list)  # seconds since the first frame
    brightness: list[float] = field(default_factory=list)  # mean luma, 0..1
    dark: list[bool] = field(default_factory=list)
    looks: list[tuple[float, float, float]] = field(default_factory=list)  # from, to (seconds), share of changed blocks
    _last_look: tuple[float, NDArray[np.uint8]] | None = None

    def add(self, time: float, planes: NDArray[np.uint8]) -> None:
        """Measure the next frame.

        Args:
            time: Seconds since the first frame.
            planes: Y, Cb and Cr, [3, height, width], luma 0 black to 255 white; of the same size as all before.
        """
        luma = planes[0]
        self.times.append(time)
        self.brightness.append(float(luma.mean()) / 255)
        self.dark.append(bool(np.count_nonzero(luma > DARK_PIXEL) <= DARK_FRAME * luma.size))
        if self._last_look is None:
            self._last_look = (time, planes)
            return
        before, reference = self._last_look
        if time - before >= LOOK_SECONDS - 1e-3:
            self.looks.append((before, time, changed_share(reference, planes)))
            self._last_look = (time, planes)

    def clip_scores(self, first: int, end: int, picture_share: float = 1.0) -> dict[str, float]:
        """Scores of the frames ``first`` up to but not including ``end``.

        Args:
            first: Frame number.
            end: Frame number.
            picture_share: Of the frame, that lies between black bars; what is measured is told of the picture alone.
        """
        start_time, last_time = self.times[first], self.times[end - 1]
        shares = [share for begin, to, share in self.looks if begin >= start_time and to <= last_time]
        return {
            "brightness": min(1.0, float(np.mean(self.brightness[first:end])) / picture_share),
            "dark_share": float(np.mean(self.dark[first:end])),
            "motion": min(1.0, float(np.mean(shares)) / picture_share) if shares else 0.0,
            "motion_time": float(np.mean([share > 0 for share in shares])) if shares else 0.0,
        }


def changed_share(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Share of the blocks of a picture, [planes, height, width], that differ between two frames in any plane.

    Chroma counts too: a red subject before a brown wall may have the wall's luma.
    """
    height, width = before.shape[1:]
    size = (max(1, width // BLOCK), max(1, height // BLOCK))
    changed = np.zeros(size[::-1], dtype=bool)
    for one, other, limit in zip(before, after, (BLOCK_CHANGE, CHROMA_CHANGE, CHROMA_CHANGE), strict=True):
        difference = cv2.absdiff(cv2.blur(one, (3, 3)), cv2.blur(other, (3, 3)))  # grain averages out, subjects do not
        changed |= cv2.resize(difference.astype(np.float32), size, interpolation=cv2.INTER_AREA) > limit
    return float(np.count_nonzero(changed) / changed.size)
