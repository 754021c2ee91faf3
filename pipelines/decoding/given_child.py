"""The process that reads one picture or clip given by a stranger, fitted to a size: a job in, an array out, the end.

Started by ``given.read_given`` as ``python -m pipelines.decoding.given_child JOB``, JOB the JSON of a ``GivenJob``.
"""

import json
import resource
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import av
import av.logging
import numpy as np
from numpy.typing import NDArray

from lumos.pictures import fit_frames
from pipelines.decoding.child import die_with_parent, limit_memory
from pipelines.decoding.errors import VideoError
from pipelines.decoding.video_file import VideoFile, VideoInfo

REFUSED = 3  # exit status of a file that cannot be used; standard output then says why
_SAME_TIME = 5e-4  # seconds


@dataclass(frozen=True, kw_only=True)
class GivenJob:
    """A local file, what is wanted of it, and what it must not exceed."""

    path: str  # absolute
    width: int  # px of the frames wanted
    height: int
    num_frames: int  # most that are wanted, the last ones; 1: the file must be a picture, else none
    fps: float  # at which they are wanted
    max_pixels: int  # of a frame of the file
    max_frames: int  # of the file
    memory_mb: int


def read(job: GivenJob) -> NDArray[np.uint8]:
    """The last frames [T, height, width, 3] of a file at a rate: the first one, and those nearest to each instant.

    Raises:
        VideoError: if it is none, or exceeds a bound.
    """
    wanted: deque[NDArray[np.uint8]] = deque(maxlen=job.num_frames)
    with VideoFile(job.path) as video:
        info = video.info()
        if job.num_frames == 1 and not (info.is_image or video.container.format.name in ("gif", "apng")):
            raise VideoError("not_an_image", f"a video ({info.codec})")
        if job.num_frames > 1 and info.is_image:
            raise VideoError("not_a_clip", f"a picture ({info.codec})")
        if info.is_image and _is_animated_webp(job.path):
            raise VideoError("unsupported", "an animated WebP: save it as GIF, or the picture of it that counts as PNG")
        if info.is_image and not _is_one_picture(video):
            raise VideoError("unsupported", f"several pictures or tiles ({info.codec}): save it as JPEG or PNG")
        _check_pixels(info.width, info.height, job)
        for frame in _sampled(video, job):
            wanted.append(_fitted(frame, info, job))
            if job.num_frames == 1:
                break
    if not wanted:
        raise VideoError("decode_error", "none of its pictures can be decoded")
    return np.stack(wanted)


def _is_animated_webp(path: str) -> bool:
    """Whether a file is a WebP of several pictures, of which FFmpeg decodes none."""
    with open(path, "rb") as file:
        head = file.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and any(flags & 2 for flags in head[20:])


def _is_one_picture(video: VideoFile) -> bool:
    """Whether a picture's file has it alone, or its transparency besides: no tiles, as phones' HEIC, no thumbnail."""
    first, *others = (stream.codec_context for stream in video.container.streams.video)
    gray = [context.pix_fmt is not None and context.pix_fmt.startswith("gray") for context in others]
    alike = [(context.width, context.height) == (first.width, first.height) for context in others]
    return len(others) <= 1 and all(gray) and all(alike) and not (others and (first.pix_fmt or "").startswith("gray"))


def _check_pixels(width: int, height: int, job: GivenJob) -> None:
    if width * height > job.max_pixels:
        detail = f"{width}x{height} px, more than {job.max_pixels / 1e6:g} million pixels"
        raise VideoError("too_large", detail)


def _sampled(video: VideoFile, job: GivenJob) -> Iterator[av.VideoFrame]:
    """The frames nearest to every instant of the wanted rate, of ties the earlier, as clips are read for training."""
    before: tuple[float, av.VideoFrame] | None = None
    first = step = 0.0
    count = 0
    for number, timed in enumerate(video.frames()):
        if number >= job.max_frames:
            raise VideoError("too_long", f"more than {job.max_frames} frames")
        _check_pixels(timed.frame.width, timed.frame.height, job)
        if before is None:
            first = timed.time
        else:
            step = timed.time - before[0]
        while True:
            instant = first + count / job.fps
            if before and round(abs(before[0] - instant), 4) <= round(abs(timed.time - instant), 4):
                yield before[1]
            elif timed.time >= instant - _SAME_TIME:
                yield timed.frame
            else:
                break
            count += 1
        before = (timed.time, timed.frame)
    # The last frame stands for half of its time more.
    if before and first + count / job.fps < before[0] + step / 2 - _SAME_TIME:
        yield before[1]


def _fitted(frame: av.VideoFrame, info: VideoInfo, job: GivenJob) -> NDArray[np.uint8]:
    turns = frame.rotation % 360 // 90
    picture: NDArray[np.uint8] = np.rot90(frame.to_ndarray(format="rgb24"), turns).view(np.uint8)
    aspect = 1 / info.pixel_aspect if turns % 2 else info.pixel_aspect
    fitted: NDArray[np.uint8] = fit_frames(picture[None], (job.width, job.height), pixel_aspect=aspect)[0]
    return fitted


def main() -> int:
    """Do the job that the command line names."""
    av.logging.set_level(av.logging.PANIC)
    die_with_parent()
    job = GivenJob(**json.loads(sys.argv[1]))
    limit_memory(job.memory_mb)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it has nothing to write but its answer, into a pipe
    try:
        frames = read(job)
    except VideoError as error:
        sys.stdout.write(f"{error.code}: {error.detail}")
        return REFUSED
    except (MemoryError, av.error.MemoryError):
        sys.stdout.write(f"memory: takes more than {job.memory_mb} MB to decode")
        return REFUSED
    except (av.error.FFmpegError, ValueError) as error:
        sys.stdout.write(f"decode_error: {type(error).__name__}")
        return REFUSED
    np.save(sys.stdout.buffer, frames)
    return 0


if __name__ == "__main__":
    sys.exit(main())
