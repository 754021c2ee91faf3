"""Video files and photographs as frames."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.settings import SourceConfig
from pipelines.errors import UserError

VIDEO_SUFFIXES = SourceConfig.extensions
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Resize = Literal["area", "bilinear", "bicubic"]


def list_videos(source: str) -> list[Path]:
    """The video files of a folder, sorted, or the one file named.

    Raises:
        UserError: There is no such path, or no video in it.
    """
    return _list_files(source, "videos", VIDEO_SUFFIXES)


def list_photos(source: str) -> list[Path]:
    """The photographs of a folder, sorted, or the one file named.

    Raises:
        UserError: There is no such path, or no photograph in it.
    """
    return _list_files(source, "photos", PHOTO_SUFFIXES)


def _list_files(source: str, what: str, suffixes: tuple[str, ...]) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{what}: {source} is neither a file nor a folder; name a file or a folder of {what}")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    if not found:
        raise UserError(f"{what}: {source} holds no {what} ({', '.join(suffixes)}); name another folder")
    return found


def read_video(
    path: Path, *, height: int, width: int, fps: float, max_frames: int | None = None, resize: Resize = "area"
) -> NDArray[np.uint8]:
    """Decode a video at a frame rate and size: frames nearest in time, centre crop to the aspect, resized.

    Frames repeat where the video has fewer. ``max_frames`` ends the reading.

    Returns:
        uint8 [T, height, width, 3], RGB.

    Raises:
        UserError: It cannot be decoded.
    """
    frames: list[Tensor] = []
    for frame in read_frames(path, fps):
        frames.append(fit(frame, height, width, resize=resize))
        if max_frames is not None and len(frames) >= max_frames:
            break
    return np.asarray(torch.cat(frames).numpy())


def read_frames(path: Path, fps: float, *, height: int | None = None) -> Iterator[UInt8[Tensor, "1 height width 3"]]:
    """The frames of a video at a frame rate, whole, and where `height` is given of so many rows at most.

    Raises:
        UserError: It cannot be decoded or has no frames.
    """
    empty = True
    try:
        for frame in _at_rate(path, fps):
            empty = False
            picture = torch.from_numpy(frame)[None]
            rows, columns = picture.shape[1:3]
            if height is None or rows <= height:
                yield picture
            else:
                yield fit(picture, height, max(1, round(columns * height / rows)))
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"video {path} cannot be decoded ({error}); remove it or repair it") from error
    if empty:
        raise UserError(f"video {path} has no frames; remove it")


def _at_rate(path: Path, fps: float) -> Iterator[NDArray[np.uint8]]:
    wanted = Fraction(0)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        gap = 1 / stream.average_rate if stream.average_rate else Fraction(1, 25)
        start: Fraction | None = None
        for index, frame in enumerate(container.decode(stream)):
            time = frame.pts * frame.time_base if frame.pts is not None and frame.time_base else index * gap
            start = time if start is None else start
            # Shown until the next frame is nearer; half a gap early so that equal rates map one to one.
            while wanted < time - start + gap / 2:
                yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
                wanted += 1 / Fraction(fps).limit_denominator(1000)


def fit(
    frames: UInt8[Tensor, "time height width 3"], height: int, width: int, *, resize: Resize = "area"
) -> UInt8[Tensor, "time h w 3"]:
    """Centre crop to the aspect of height x width, then resize to it (area: the mean of what a pixel covers)."""
    rows, columns = frames.shape[1:3]
    kept_rows = min(rows, max(1, round(columns * height / width)))
    kept_columns = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    cropped = frames[:, top : top + kept_rows, left : left + kept_columns]
    if (kept_rows, kept_columns) == (height, width):
        return cropped
    images = rearrange(cropped.float(), "t h w c -> t c h w")
    images = F.interpolate(images, size=(height, width), mode=resize, antialias=resize != "area")
    return rearrange(images.round().clamp(0, 255).to(torch.uint8), "t c h w -> t h w c")
