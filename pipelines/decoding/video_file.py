"""Opening video files and pictures, defensively. Runs only in children, never in a worker or a server itself."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.logging
from av.stream import Disposition

from pipelines.decoding.errors import VideoError, unreadable_error

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
IMAGE_BRANDS = ("avif", "heic", "heix", "mif1")  # pictures in MP4's container
_FALLBACK_FPS = 25.0  # of a file that names no rate


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


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame."""

    frame: av.VideoFrame
    time: float  # seconds, as the file counts them
    duration: float  # seconds, 0 where unknown
    is_damaged: bool = False  # whether the decoder has concealed damage in it, or told of an error since the last one


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
        self._has_reported = False  # whether the decoder has told of an error since the last frame

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
            is_image=self.container.format.name in _IMAGES
            or self.container.metadata.get("major_brand", "").strip() in IMAGE_BRANDS,
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
            is_damaged, self._has_reported = frame.is_corrupt or self._has_reported, False
            yield TimedFrame(frame, time, (frame.duration or 0) * base, is_damaged)

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
                with _listen() as reports:
                    frames = packet.decode()
                self._has_reported |= bool(reports)
            except av.error.EOFError:
                return
            except (av.error.MemoryError, MemoryError):
                raise
            except (av.error.PatchWelcomeError, av.error.DecoderNotFoundError) as error:
                codec = self.stream.codec_context.name
                raise VideoError("unsupported_codec", f"{codec}: {error.strerror}") from error
            except av.error.FFmpegError:
                self.errors += 1
                self._has_reported = True
                continue
            yield from frames


@contextmanager
def _listen() -> Iterator[list[Any]]:
    """Collect what FFmpeg tells of errors that it recovers from, and let nobody else hear."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as reports:
            yield reports
    finally:
        av.logging.set_level(level)


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
