"""Opening and reading video files, defensively. Runs only in decode children (decode.py), never in a worker itself."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from pipelines.data.reasons import Failure
from pipelines.data.video.fingerprint import TOLERANCE, WRONG, FingerprintCheck, frame_thumbnail, rgb_thumbnail

# How common containers begin: (offset, bytes).
_MAGIC = {
    "mp4/mov": ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide")),
    "mkv/webm": ((0, b"\x1aE\xdf\xa3"),),
    "avi": ((0, b"RIFF"),),
    "mpeg": ((0, b"\x00\x00\x01\xba"), (0, b"\x00\x00\x01\xb3")),
    "flv": ((0, b"FLV"),),
    "gif": ((0, b"GIF8"),),
}
# Containers of frames only: a playlist under the name of a video must not make us read other files or the network.
_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,flv,gif,ogg,asf,mxf,nut,rm,dv,ivf,h264,hevc,obu,"
    "yuv4mpegpipe,apng,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe",
}
# The name of a picture misleads: FFmpeg takes most .jpg files, and any with a "%", for a numbered series of files.
_IMAGES = {
    "jpeg_pipe": re.compile(rb"\xff\xd8\xff"),
    "png_pipe": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "webp_pipe": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "bmp_pipe": re.compile(rb"BM"),
    "tiff_pipe": re.compile(rb"II\*\0|MM\0\*"),
}
MISMATCH = "decode_mismatch"  # code of a clip whose frames are not those that were scored
_SAME_TIME = 5e-4  # seconds; spans are stored in milliseconds
_FALLBACK_FPS = 25.0  # of a file that names no rate
_SEEK_FROM = 4.0  # seconds into the file; decoding up to there costs less than a seek can go wrong


class VideoError(Exception):
    """A file that yields no usable video: class of the failure in one word, and whether it may do better again."""

    def __init__(self, code: str, detail: str, *, transient: bool = False) -> None:
        super().__init__(code, detail, transient)
        self.code = code
        self.detail = detail
        self.transient = transient

    @property
    def reason(self) -> str:
        """As the ledger tells it."""
        return str(Failure(self.code, self.detail, transient=self.transient))


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video stream."""

    codec: str
    pixel_format: str
    width: int  # px of the coded picture
    height: int
    pixel_aspect: float  # width / height of a pixel
    declared_fps: float  # 0 where the file does not say
    declared_frames: int  # 0 likewise
    declared_seconds: float  # 0 likewise
    is_image: bool = False


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
    clips: list[dict[str, Any]]  # start_s, end_s, scores and fingerprint of each, in order


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame."""

    frame: av.VideoFrame
    time: float  # seconds, as the file counts them
    duration: float  # seconds, 0 where unknown


class VideoFile:
    """A video file opened with PyAV, one decoding thread.

    Raises:
        VideoError: it cannot be opened, or has no video stream that can be decoded.
    """

    def __init__(self, path: str) -> None:
        try:
            self.container = _open_container(path)
        except (av.error.FFmpegError, ValueError) as error:
            raise _open_error(path, error) from error
        streams = [
            stream for stream in self.container.streams.video if Disposition.attached_pic not in stream.disposition
        ]
        if not streams:
            kinds = sorted({stream.type for stream in self.container.streams})
            self.container.close()
            raise VideoError("no_video_stream", f"holds {', '.join(kinds) or 'no streams'}")
        self.stream = streams[0]
        context = self.stream.codec_context
        if context is None:
            self.container.close()
            raise VideoError("unsupported_codec", "no decoder for its video stream")
        context.thread_count = 1
        self.errors = 0  # packets that could not be decoded
        self.clean_clock = True  # every frame so far had a time, later than the one before

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def info(self) -> VideoInfo:
        """What the file says of itself, unchecked."""
        stream, context = self.stream, self.stream.codec_context
        seconds = 0.0
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        elif self.container.duration:
            seconds = self.container.duration / av.time_base
        ratio = context.sample_aspect_ratio or stream.sample_aspect_ratio or Fraction(1)
        return VideoInfo(
            codec=context.name,
            pixel_format=context.pix_fmt or "unknown",
            width=context.width,
            height=context.height,
            pixel_aspect=float(ratio) if ratio > 0 else 1.0,
            declared_fps=float(stream.average_rate or 0),
            declared_frames=stream.frames,
            declared_seconds=max(seconds, 0.0),
            is_image=self.container.format.name in _IMAGES,
        )

    def seek(self, time: float) -> None:
        """Continue at or before an instant (seconds as the file counts them), as far as its index can be trusted."""
        base = self.stream.time_base
        if base:
            self.container.seek(int(time / base), stream=self.stream)

    def frames(self) -> Iterator[TimedFrame]:
        """The frames from here on in order of presentation, those that can be decoded; ``errors`` counts the others.

        ``clean_clock`` turns false where frames have no time, or do not follow one another; they get one then.
        """
        last: float | None = None
        rate = float(self.stream.average_rate or 0) or _FALLBACK_FPS
        for frame in self._decoded():
            base = float(frame.time_base or self.stream.time_base or 0)
            pts = frame.pts if base else None
            time = 0.0 if pts is None else pts * base
            if pts is None or (last is not None and time <= last):
                self.clean_clock = False
                time = 0.0 if last is None else last + 1 / rate
            last = time
            yield TimedFrame(frame, time, (frame.duration or 0) * base)

    def _decoded(self) -> Iterator[av.VideoFrame]:
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError:  # the rest of the file cannot be read
                self.errors += 1
                return
            try:
                frames = packet.decode()
            except av.error.EOFError:
                return
            except (av.error.MemoryError, MemoryError):
                raise
            except (av.error.PatchWelcomeError, av.error.DecoderNotFoundError) as error:
                codec = self.stream.codec_context.name
                raise VideoError("unsupported_codec", f"{codec}: {error.strerror}") from error
            except av.error.FFmpegError:
                self.errors += 1
                continue
            yield from frames


def _open_container(path: str) -> av.container.InputContainer:
    try:
        return av.open(path, options=dict(_OPEN_OPTIONS), metadata_errors="ignore")
    except av.error.ArgumentError:
        head = _read_head(path)
        for name, mark in _IMAGES.items():
            if mark.match(head):
                return av.open(path, format=name, options=dict(_OPEN_OPTIONS), metadata_errors="ignore")
        raise


def _read_head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)


def _open_error(path: str, error: Exception) -> VideoError:
    """Tell a damaged video from a file that never was one, by its first bytes."""
    try:
        head = _read_head(path)
    except OSError as unreadable:  # it could be read when it was hashed
        return unreadable_error(unreadable, transient=True)
    if not head:
        return VideoError("empty_file", "0 bytes")
    for container, marks in _MAGIC.items():
        if any(head[offset : offset + len(mark)] == mark for offset, mark in marks):
            return VideoError("damaged_container", f"begins as {container} but cannot be opened: truncated or corrupt")
    if not any(head):
        return VideoError("not_a_video", "begins with zero bytes")
    return VideoError("not_a_video", f"no known container ({type(error).__name__})")


def unreadable_error(error: OSError, *, transient: bool = False) -> VideoError:
    """The failure of a file that the system does not let us read; transient if it could be read before."""
    if isinstance(error, FileNotFoundError):
        return VideoError("missing_file", "no such file, or a broken link", transient=transient)
    if isinstance(error, PermissionError):
        return VideoError("unreadable_file", "no permission to read it", transient=transient)
    if isinstance(error, IsADirectoryError):
        return VideoError("not_a_video", "a folder", transient=transient)
    return VideoError("unreadable_file", error.strerror or type(error).__name__, transient=True)


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
    left, top, box_width, box_height = picture or (0, 0, width, height)
    target = size[0] / size[1] / pixel_aspect  # width / height of the cut, in source pixels
    cut_width = min(box_width, max(1, round(box_height * target)))
    cut_height = min(box_height, max(1, round(box_width / target)))
    left += (box_width - cut_width) // 2
    top += (box_height - cut_height) // 2
    cut = np.ascontiguousarray(frame[top : top + cut_height, left : left + cut_width])
    if cut.shape[:2] == size[::-1]:
        return cut
    shrinks = cut_width >= size[0] and cut_height >= size[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    scaled: Any = cv2.resize(cut, size, interpolation=method)
    return np.asarray(scaled, dtype=np.uint8)
