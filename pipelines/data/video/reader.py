"""Reading clips of video files, defensively. Runs only in decode children (decode.py), never in a worker itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from lumos.pictures import centre_cut
from pipelines.data.video.fingerprint import TOLERANCE, WRONG, FingerprintCheck, frame_thumbnail, rgb_thumbnail
from pipelines.decoding.errors import VideoError
from pipelines.decoding.video_file import VideoFile

MISMATCH = "decode_mismatch"  # code of a clip whose frames are not those that were scored
_SAME_TIME = 5e-4  # seconds; spans are stored in milliseconds
_SEEK_FROM = 4.0  # seconds into the file; decoding up to there costs less than a seek can go wrong


@dataclass(frozen=True, kw_only=True)
class DecodedSource:
    """A source whose frames have all been looked at; all but ``clips`` are columns of the split stage."""

    codec: str
    pixel_format: str
    pixel_aspect: float  # width / height of a pixel of the upright picture
    rotation: int  # degrees counter-clockwise that stand its picture upright
    picture: tuple[int, int, int, int]  # left, top, width, height of what lies between black bars, px of the upright
    origin_s: float  # time of its first frame, as the file counts
    clean_clock: bool  # whether every frame had a time, later than the one before
    source_frames: int  # that could be decoded
    clips: list[dict[str, Any]]  # start_s, end_s, scores, fingerprint and movement of each, in order


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """Frames of one clip, wanted at one size."""

    path: str  # local file
    start_s: float  # begin of the clip's span, seconds since the source's first frame
    end_s: float  # end of it; frames at or after it belong to another shot
    fps: float  # frames per second wanted
    num_frames: int  # how many
    width: int  # px wanted
    height: int
    picture: Sequence[int] | None = None  # left, top, width, height, px of the upright source; None for all of it
    rotation: int = 0  # degrees that the coded picture is turned counter-clockwise to stand upright
    pixel_aspect: float = 1.0  # width / height of a pixel of the upright picture
    source_frames: int = 0  # that a full decode gave; a decoder that sees another number is not trusted
    origin_s: float = 0.0  # time of the source's first frame, as the file counts
    clean_clock: bool = True  # whether every frame of the source had a time, later than the one before
    fingerprint: bytes = b""  # with which its frames are compared; empty if nothing is known of them


@dataclass(frozen=True)
class _Reading:
    """What one way of decoding gave."""

    frames: list[NDArray[np.uint8]]  # those wanted
    difference: float  # from the fingerprint, 0..255
    begins_alike: bool

    @property
    def is_trusted(self) -> bool:
        """Whether what was reached by a seek is what was scored."""
        return self.difference <= TOLERANCE and self.begins_alike


def read_clip(request: ClipRequest, *, beat: Callable[[], None], use_decord: bool = True) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3] of a clip: with decord where one seek leads to all of them, else with PyAV.

    Both give the same pixels, so it does not show which it was. What they show is compared with the clip's
    fingerprint, as a file's index may lead a seek to where nothing can be decoded rightly; where it differs, the file
    is read on from its start. (A seek in the midst of a clip could smear frames between two that are compared.)
    ``beat`` is called as work goes on; ``use_decord`` is false after decord has hung or crashed on this clip.

    Raises:
        VideoError: the clip's frames cannot be decoded, or are not those that were scored.
    """
    reading: _Reading | None = None
    # decord knows nothing of turned pictures, and takes the times in the file for granted.
    if use_decord and request.clean_clock and request.rotation == 0:
        reading = _read_with_decord(request, beat)
    if not (reading and reading.is_trusted) and request.clean_clock and request.start_s > _SEEK_FROM:
        reading = _read_with_pyav(request, beat, seek=True)
    if not (reading and reading.is_trusted):
        reading = _read_with_pyav(request, beat, seek=False)
        if reading and reading.difference > WRONG:
            differ = f"they differ by {reading.difference:.1f} of 255"
            raise VideoError(MISMATCH, f"its frames are not those that were scored ({differ})")
    if reading is None:
        raise VideoError("decode_error", "no frames in the clip's span on second decode", transient=True)
    return np.stack(reading.frames)


def pick_frames(times: NDArray[np.float64], request: ClipRequest) -> list[int]:
    """Indices of the frames nearest to the wanted instants, of those within the clip's span; ties go to the earlier.

    Times are those of all frames in ascending order, seconds since the source's first frame.
    """
    first, end = np.searchsorted(times, np.array([request.start_s, request.end_s]) - _SAME_TIME).tolist()
    if first >= end:
        return []
    inside = times[first:end]
    wanted = inside[0] + np.arange(request.num_frames) / request.fps
    after = np.clip(np.searchsorted(inside, wanted), 1, max(1, len(inside) - 1))
    before = after - 1
    after = np.minimum(after, len(inside) - 1)
    nearer = np.round(np.abs(inside[after] - wanted), 4) < np.round(np.abs(inside[before] - wanted), 4)
    chosen: list[int] = (first + np.where(nearer, after, before)).tolist()
    return chosen


def _read_with_decord(request: ClipRequest, beat: Callable[[], None]) -> _Reading | None:
    try:
        import decord
    except ImportError:  # no wheels for this platform
        return None
    decord.logging.set_level(decord.logging.FATAL)
    check = FingerprintCheck(request.start_s, request.fingerprint)
    frames: list[NDArray[np.uint8]] = []
    try:
        reader = decord.VideoReader(request.path, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != request.source_frames:
            return None
        times = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
        times -= times[0]
        chosen = pick_frames(times, request)
        keys = np.array(reader.get_key_indices())
        if not chosen or np.any((keys > chosen[0]) & (keys <= chosen[-1])):
            return None  # it would seek again in the midst of the clip, to where it may be led wrong
        for index in range(chosen[0], chosen[-1] + 1):
            beat()
            copies = chosen.count(index)
            is_checked = check.wants(float(times[index]))
            if is_checked or copies:
                picture = reader.get_batch([index]).asnumpy()[0]
                frames += [fit_frame(picture, request)] * copies
                if is_checked:
                    check.add(rgb_thumbnail(picture))
    except (decord.DECORDError, RuntimeError, IndexError, UnicodeEncodeError):  # it takes names in UTF-8 only
        return None
    return _Reading(frames, check.difference(whole=False), check.begins_alike()) if frames else None


def _read_with_pyav(request: ClipRequest, beat: Callable[[], None], *, seek: bool) -> _Reading | None:
    """The frames that ``pick_frames`` would choose, in one pass that holds two full-size frames at most."""
    chosen: list[NDArray[np.uint8]] = []
    check = FingerprintCheck(request.start_s, request.fingerprint)
    scaler = VideoReformatter()
    first: float | None = None
    before: tuple[float, av.VideoFrame] | None = None

    def take(frame: av.VideoFrame) -> None:
        picture: NDArray[np.uint8] = np.rot90(frame.to_ndarray(format="rgb24"), request.rotation // 90).view(np.uint8)
        chosen.append(fit_frame(picture, request))

    for time, frame in _decode_span(request, beat, seek=seek):
        if check.wants(time):
            check.add(frame_thumbnail(frame, scaler))
        first = time if first is None else first
        while len(chosen) < request.num_frames:
            wanted = first + len(chosen) / request.fps
            if before is not None and round(abs(before[0] - wanted), 4) <= round(abs(time - wanted), 4):
                take(before[1])
            elif time >= wanted:
                take(frame)
            else:
                break
        before = (time, frame)
        if len(chosen) == request.num_frames:
            return _Reading(chosen, check.difference(whole=False), check.begins_alike())
    while before is not None and len(chosen) < request.num_frames:
        take(before[1])
    return _Reading(chosen, check.difference(whole=True), check.begins_alike()) if chosen else None


def _decode_span(
    request: ClipRequest, beat: Callable[[], None], *, seek: bool
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds since the source's first frame, frame) of a clip; none where a seek leads past its begin."""
    with VideoFile(request.path) as video:
        if seek:
            video.seek(request.origin_s + request.start_s - 1.0)
        led_past = seek  # until a frame at or before the begin shows
        for timed in video.frames():
            beat()
            time = timed.time - request.origin_s
            if time >= request.end_s - _SAME_TIME or (led_past and time > request.start_s + _SAME_TIME):
                return
            led_past = False
            if time >= request.start_s - _SAME_TIME:
                yield time, timed.frame


def fit_frame(frame: NDArray[np.uint8], request: ClipRequest) -> NDArray[np.uint8]:
    """Cut the centre of the picture to the wanted shape, then scale it (by area, so that nothing aliases)."""
    size = (request.width, request.height)
    return fit_picture(frame, size, picture=request.picture, pixel_aspect=request.pixel_aspect)


def fit_picture(
    frame: NDArray[np.uint8], size: tuple[int, int], *, picture: Sequence[int] | None = None, pixel_aspect: float = 1.0
) -> NDArray[np.uint8]:
    """As ``fit_frame``, to a size (width, height) in px."""
    height, width = frame.shape[:2]
    box = picture or (0, 0, width, height)
    left, top, cut_width, cut_height = centre_cut(box, size, pixel_aspect=pixel_aspect)
    cut = np.ascontiguousarray(frame[top : top + cut_height, left : left + cut_width])
    if cut.shape[:2] == size[::-1]:
        return cut
    shrinks = cut_width >= size[0] and cut_height >= size[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    scaled: Any = cv2.resize(cut, size, interpolation=method)
    return np.asarray(scaled, dtype=np.uint8)
