"""Fingerprints: thumbnails of a clip, one for every half second, by which its pictures are known again.

The pass that scores a source leaves them. Near-duplicates are found by them across the set (duplicates.py), and what
is decoded of a clip later is compared with them, because a seek may lie: in a file whose packets flag other frames as
key frames, decoding from there on shows grey smear that nothing else tells from a picture.
"""

from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

THUMBNAIL = 8  # px, both ways
DIMENSIONS = THUMBNAIL * THUMBNAIL * 3
STEP_SECONDS = 0.5  # between the thumbnails of a fingerprint
LOOK_SECONDS = 1 / 8  # between those that it is chosen from

# Mean difference, 0..255, of two decoders' thumbnails of a frame, at most; 1.3 was seen, smear has 3-100.
TOLERANCE = 2.0
WRONG = 10.0  # likewise, above which it is no question of how pictures are scaled; 6.7 was seen of fine stripes
_UNLIKE = 16.0  # likewise, above which a clip's first frame has nothing of a frame shortly after
_REACH = 0.13  # seconds from a fingerprint's instant to the frame it shows, at a steady rate of 8 or more a second
_FIRST_REACH = 0.26  # likewise of the first one, before which there is none to choose
_CHECK_WIDTH = 256  # px of the small picture that is compared; as split.width is by default
_SLACK = 1.5e-3  # seconds by which frames may be nearer or farther apart than they should


def small_size(width: int, height: int, target: int) -> tuple[int, int]:
    """Size of the low-resolution picture; its longer side is at most the target."""
    scale = min(1.0, target / max(width, height))
    return max(8, round(width * scale / 2) * 2), max(8, round(height * scale / 2) * 2)


def small_planes(frame: av.VideoFrame, size: tuple[int, int], scaler: VideoReformatter) -> NDArray[np.uint8]:
    """Y, Cb and Cr of a frame, averaged to (width, height): [3, height, width]."""
    small = scaler.reformat(frame, *size, "yuvj444p", interpolation="AREA", threads=1)
    return np.asarray(small.to_ndarray(), np.uint8)


def thumbnail(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame's Y, Cb and Cr, [3, height, width], averaged to a tiny picture in BGR, its colours half as strong.

    Codecs save on colour, so that two encodings of a picture differ in it most.
    """
    size = (THUMBNAIL, THUMBNAIL)
    return _pale(np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes]))


def frame_thumbnail(frame: av.VideoFrame, scaler: VideoReformatter) -> NDArray[np.uint8]:
    """The same of a frame, as the split pass takes it where ``split.width`` is what it is by default."""
    return thumbnail(small_planes(frame, small_size(frame.width, frame.height, _CHECK_WIDTH), scaler))


def rgb_thumbnail(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same of an RGB frame [height, width, 3], a level or so off."""
    tiny = cv2.resize(picture, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    luma, red, blue = cv2.split(cv2.cvtColor(tiny, cv2.COLOR_RGB2YCrCb))
    return _pale(np.stack([luma, blue, red]))


def _pale(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    luma, blue, red = planes
    colours = [64 + np.asarray(plane, np.float32) / 2 for plane in (red, blue)]
    tiny = np.dstack([luma, *colours]).round().astype(np.uint8)
    return np.asarray(cv2.cvtColor(tiny, cv2.COLOR_YCrCb2BGR), np.uint8)


def make_fingerprint(thumbnails: Sequence[tuple[float, bytes]], start: float, end: float) -> bytes:
    """The thumbnails nearest to each half second of a span of seconds, one after another.

    Those of the source are (seconds, bytes), ``LOOK_SECONDS`` or more apart.
    """
    first = bisect_left(thumbnails, start - 1e-6, key=itemgetter(0))
    inside = thumbnails[first : bisect_left(thumbnails, end - 1e-6, key=itemgetter(0))]
    if not inside:
        return b""
    times = np.array([time for time, _ in inside])
    wanted = np.arange(start, inside[-1][0] + 1e-6, STEP_SECONDS)
    after = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    before = np.maximum(after - 1, 0)
    nearest = np.where(wanted - times[before] <= np.abs(times[after] - wanted), before, after)
    return b"".join(inside[index][1] for index in nearest)


class FingerprintCheck:
    """Whether the frames of a clip, decoded again, are those of its fingerprint; if that is empty, nothing is checked.

    Which frame a thumbnail shows is known to an eighth of a second only, so it is looked for among those around.
    Where frames come at an uneven rate it cannot be said where to look, and such an instant is not judged.
    """

    def __init__(self, start_s: float, fingerprint: bytes) -> None:
        self._prints = np.frombuffer(fingerprint, np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL, 3).astype(np.float32)
        self._instants = start_s + STEP_SECONDS * np.arange(len(self._prints))
        self._least = np.full(len(self._prints), np.inf)  # difference of the likest frame around
        self._times: list[float] = []
        self._rare: list[tuple[float, NDArray[np.float32]]] = []  # frames that come so late after another, differences

    def wants(self, time: float) -> bool:
        """Whether the next frame, of that time, is one to compare. To be asked of every frame, in order."""
        self._times.append(time)
        return bool(len(self._prints)) and (self._is_rare() or bool(self._near(time).any()))

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Compare with the thumbnail of the last frame that was asked about."""
        differences = np.abs(self._prints - picture).mean(axis=(1, 2, 3))
        if self._is_rare():
            self._rare.append((self._times[-1], differences))
        near = self._near(self._times[-1])
        self._least[near] = np.minimum(self._least[near], differences[near])

    def _is_rare(self) -> bool:
        return len(self._times) == 1 or self._times[-1] - self._times[-2] >= LOOK_SECONDS - _SLACK

    def _near(self, time: float) -> NDArray[np.bool_]:
        """The instants, not recognized yet, whose thumbnail may be this frame's."""
        distance = np.abs(self._instants - time)
        near = distance <= _REACH
        near[:1] |= distance[:1] <= _FIRST_REACH
        return np.asarray(near & (self._least > TOLERANCE))

    def difference(self, *, whole: bool) -> float:
        """The largest difference of a thumbnail from the likest frame seen, 0..255; 0 where none can be judged.

        Above ``TOLERANCE`` something is not as it was, or of another size of the small picture; above ``WRONG`` surely
        the former. If the ``whole`` span was seen, its last instants are judged too.
        """
        times, found = np.array(self._times), 0.0
        for place, instant in enumerate(self._instants.tolist()):
            first = max(0, int(np.searchsorted(times, instant - _FIRST_REACH)) - 1)
            gaps = np.diff(times[first : int(np.searchsorted(times, instant + _FIRST_REACH)) + 1])
            if not len(times) or not (whole or times[-1] >= instant + _FIRST_REACH):
                continue
            if np.all(gaps <= LOOK_SECONDS + _SLACK):
                found = max(found, float(self._least[place]))
            elif np.all(gaps >= LOOK_SECONDS - _SLACK):  # every frame is one that the fingerprint was chosen from
                nearest = sorted(self._rare, key=lambda frame: abs(frame[0] - instant))[:2]
                found = max(found, min(float(differences[place]) for _, differences in nearest))
        return found

    def begins_alike(self) -> bool:
        """Whether the first frame resembles the one that the first thumbnail shows, which may come a little later.

        A picture that is smeared for its first frames alone does not; nor does one that begins with a flash.
        """
        return not self._rare or float(self._rare[0][1][0]) <= _UNLIKE
