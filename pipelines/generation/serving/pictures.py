"""Small pictures of a finished video, and the joining of one that goes on with another."""

import io
import math

import av
import numpy as np

from pipelines.media import VideoFormat, encode_jpeg, encode_video

_MAX_TILES = 25  # of a sprite sheet
_MAX_WIDTH = 2048  # px of a sprite sheet


class DamagedError(Exception):
    """A file that this service wrote, and that is no longer as it was."""


def decode_frames(data: bytes) -> np.ndarray:
    """Frames, uint8 [T, H, W, 3], of a file that this service wrote.

    Raises:
        DamagedError: if it cannot be decoded.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.error.FFmpegError, LookupError, ValueError) as error:
        raise DamagedError(str(error)) from error


def thumbnail(frames: np.ndarray) -> bytes:
    """A JPEG of the middle frame."""
    return encode_jpeg(frames[len(frames) // 2])


def spritesheet(frames: np.ndarray) -> bytes:
    """A JPEG of up to 25 frames, evenly spaced, in rows from left to right; scaled down where that is too wide."""
    tiles = frames[np.linspace(0, len(frames) - 1, min(len(frames), _MAX_TILES)).round().astype(int)]
    columns = math.ceil(math.sqrt(len(tiles)))
    step = math.ceil(columns * tiles.shape[2] / _MAX_WIDTH)
    tiles = tiles[:, ::step, ::step]
    rows = math.ceil(len(tiles) / columns)
    sheet = np.zeros((rows * columns, *tiles.shape[1:]), np.uint8)
    sheet[: len(tiles)] = tiles
    height, width = tiles.shape[1:3]
    grid = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return encode_jpeg(np.ascontiguousarray(grid.reshape(rows * height, columns * width, 3)))


def joined(before: bytes, continuation: bytes, num_shared: int, fps: float, file_format: VideoFormat) -> bytes:
    """The frames of a video, and those of one that begins with its last ``num_shared``, as one file."""
    frames = np.concatenate([decode_frames(before), decode_frames(continuation)[num_shared:]])
    return encode_video(frames, fps, file_format)
