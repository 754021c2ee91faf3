"""What is measured of every frame in the low-resolution pass, and what that says of a span of frames.

Everything is measured on decoded pixels, so it does not depend on the codec.

Motion is looked for between frames 1/8 s apart, in 8x8 px blocks of the small picture: a block has changed if its mean
absolute difference, in luma or in chroma, exceeds what compression does to a still picture. ``motion`` is the mean
share of changed blocks, which a moving camera drives up. ``motion_time`` is the share of the time between looks with
any changed block: it tells a static camera with a small moving subject (always something moves) from a still shot or a
slide that is turned now and then (nothing moves most of the time).

A flash is a frame much brighter or darker than the frames around it; a repeat shows the very picture of the frame
before, as a stalled recording does.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipelines.data.scores import scores_of
from pipelines.data.video.fingerprint import LOOK_SECONDS
from pipelines.data.video.graphics import noisiness, plain_share

_MEASURED = {score.name: score.measure for score in scores_of("split") if score.measure is not None}
BLOCK = 8  # px
BLOCK_CHANGE = 4.0  # mean absolute difference of a block's luma, 0..255; grain and usual compression stay below
CHROMA_CHANGE = 12.0  # likewise of Cb or Cr, in which codecs save most
DARK_PIXEL = 32  # luma, 0..255
FLASH = 0.1  # of the range of luma, by which a flash differs from the median of the frames around it
FLASH_REACH = 3  # frames before and after that count as around it
REPEAT = 0.1  # mean absolute difference of luma, 0..255, at which a frame repeats the one before
STANDS = 0.25  # seconds until the next frame, beyond which a picture is shown to stand still, as slides are
DARK_FRAME = 0.01  # share of brighter pixels that a frame may have and still count as black


@dataclass
class FrameMeter:
    """Collects measurements frame by frame, about 50 bytes each."""

    times: list[float] = field(default_factory=list)  # seconds since the first frame
    brightness: list[float] = field(default_factory=list)  # mean luma, 0..1
    dark: list[bool] = field(default_factory=list)
    looks: list[tuple[float, float, float]] = field(default_factory=list)  # from, to (seconds), share of changed blocks
    repeats: list[bool] = field(default_factory=list)
    damaged: list[bool] = field(default_factory=list)
    # Seconds, variance of the Laplacian, share that is plain, noisiness.
    pictures: list[tuple[float, float, float, float]] = field(default_factory=list)
    measured: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _MEASURED})
    _last: NDArray[np.uint8] | None = None
    _last_look: tuple[float, list[NDArray[np.uint8]]] | None = None

    def add(self, time: float, planes: NDArray[np.uint8], *, is_damaged: bool = False) -> None:
        """Measure the next frame: Y, Cb and Cr, [3, height, width], luma 0 black to 255 white; all of one size."""
        luma = planes[0]
        self.times.append(time)
        self.damaged.append(is_damaged)
        self.brightness.append(cv2.mean(luma)[0] / 255)
        bright_pixels = cv2.countNonZero(cv2.threshold(luma, DARK_PIXEL, 1, cv2.THRESH_BINARY)[1])
        self.dark.append(bright_pixels <= DARK_FRAME * luma.size)
        same = self._last is not None and cv2.norm(self._last, luma, cv2.NORM_L1) <= REPEAT * luma.size
        self.repeats.append(same)
        self._last = luma
        for name, measure in _MEASURED.items():
            self.measured[name].append(measure(planes))
        if self._last_look is None:
            self._last_look = (time, smooth(planes))
        elif time - self._last_look[0] >= LOOK_SECONDS - 1e-3:
            before, reference = self._last_look
            self._last_look = (time, smooth(planes))
            self.looks.append((before, time, changed_share(reference, self._last_look[1])))

    def add_picture(self, time: float, luma: NDArray[np.uint8], small: NDArray[np.uint8]) -> None:
        """Measure the luma of a frame, [height, width], at full size and ``small``; now and then is enough."""
        edges = cv2.Laplacian(luma, cv2.CV_16S)
        # Its variance; cv2.meanStdDev takes ten times as long.
        sharpness = cv2.norm(edges, cv2.NORM_L2SQR) / edges.size - cv2.mean(edges)[0] ** 2
        self.pictures.append((time, sharpness, plain_share(small), noisiness(small)))

    def clip_scores(self, first: int, end: int, picture_share: float = 1.0) -> dict[str, float]:
        """Scores of frames ``first`` up to but not including ``end``, told of the share between black bars alone."""
        start_time, last_time = self.times[first], self.times[end - 1]
        # Looks follow one another, so those of a span are a stretch of them; a film may have a million.
        begin = bisect_left(self.looks, start_time, key=itemgetter(0))
        stop = bisect_right(self.looks, last_time, key=itemgetter(1))
        looks = self.looks[begin:stop]
        shares = [share for _, _, share in looks]
        # Where a picture stands for seconds, as at an uneven rate, one look at it spans them.
        seconds = sum(until - since for since, until, _ in looks)
        moving = sum(min(until - since, STANDS) for since, until, share in looks if share > 0)
        sharpness, plain, noise = self._of_pictures(start_time, last_time)
        return {
            "decode_errors": float(np.count_nonzero(self.damaged[first:end])),
            "brightness": min(1.0, float(np.mean(self.brightness[first:end])) / picture_share),
            "dark_share": float(np.mean(self.dark[first:end])),
            "flash_share": float(np.mean(_flashes(self.brightness[first:end]))),
            "repeat_share": float(np.mean(self.repeats[first:end])),
            "freeze": self._longest_freeze(first, end),
            "sharpness": sharpness / picture_share,
            "plain_share": max(0.0, 1 - (1 - plain) / picture_share),  # bars are plain
            "noise": noise,
            "motion": min(1.0, float(np.mean(shares)) / picture_share) if shares else 0.0,
            "motion_time": moving / seconds if looks else 0.0,
            **{name: float(np.mean(values[first:end])) for name, values in self.measured.items()},
        }

    def _longest_freeze(self, first: int, end: int) -> float:
        longest, since = 0.0, first
        for index in range(first + 1, min(end + 1, len(self.times))):
            stays = index < end and self.repeats[index]
            if stays or self.times[index] - self.times[index - 1] > STANDS:
                longest = max(longest, self.times[index] - self.times[since])
            if not stays:
                since = index
        return longest

    def _of_pictures(self, start: float, last: float) -> tuple[float, ...]:
        """The means of what was measured of pictures between two instants, or of those around them."""
        begin = bisect_left(self.pictures, start - 1e-6, key=itemgetter(0))
        stop = bisect_right(self.pictures, last + 1e-6, key=itemgetter(0))
        inside = self.pictures[begin:stop] or self.pictures[max(0, begin - 1) : begin + 1]
        return tuple(np.mean(inside, axis=0)[1:].tolist()) if inside else (0.0, 0.0, 0.0)


def _flashes(brightness: Sequence[float]) -> NDArray[np.bool_]:
    """Whether each frame differs much from the median of those around it; only clips of some length can tell."""
    values = np.asarray(brightness)
    if len(values) < 2 * FLASH_REACH + 1:
        return np.zeros(len(values), bool)
    around = sliding_window_view(np.pad(values, FLASH_REACH, mode="edge"), 2 * FLASH_REACH + 1)
    flashes: NDArray[np.bool_] = np.abs(values - np.median(around, axis=1)) > FLASH
    return flashes


def smooth(planes: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Planes of a picture in which grain averages out, and subjects do not."""
    return [np.asarray(cv2.blur(plane, (3, 3)), np.uint8) for plane in planes]


def changed_share(before: Sequence[NDArray[np.uint8]], after: Sequence[NDArray[np.uint8]]) -> float:
    """Share of the blocks of a picture that differ between two frames in any plane (Y, Cb and Cr, ``smooth``).

    Chroma counts too: a red subject before a brown wall may have the wall's luma.
    """
    height, width = before[0].shape
    size = (max(1, width // BLOCK), max(1, height // BLOCK))
    changed = np.zeros(size[::-1], dtype=bool)
    for one, other, limit in zip(before, after, (BLOCK_CHANGE, CHROMA_CHANGE, CHROMA_CHANGE), strict=True):
        difference = cv2.absdiff(one, other).astype(np.float32)
        changed |= cv2.resize(difference, size, interpolation=cv2.INTER_AREA) > limit
    return float(np.count_nonzero(changed) / changed.size)
