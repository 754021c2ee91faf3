"""Small real videos, rendered for tests."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def moving_square(frames: int = 24, *, size: tuple[int, int] = (64, 64), side: int = 16, seed: int = 0) -> np.ndarray:
    """A bright square that moves 2 px per frame over a still, textured background: [T, H, W, 3]."""
    width, height = size
    generator = np.random.default_rng(seed)
    coarse = generator.integers(40, 120, (height // 8 + 1, width // 8 + 1, 3))
    video = np.repeat(np.kron(coarse, np.ones((8, 8, 1)))[None, :height, :width], frames, axis=0).astype(np.uint8)
    top = int(generator.integers(0, height - side))
    for index, frame in enumerate(video):
        left = (2 * index) % (width - side)
        frame[top : top + side, left : left + side] = (250, 220, 40 + seed % 200)
    return video


def numbered(frames: int, *, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Frames that can be told apart after compression: index i shows its bits as black and white columns."""
    width, height = size
    video = np.zeros((frames, height, width, 3), np.uint8)
    for index, frame in enumerate(video):
        for bit in range(8):
            frame[:, bit * width // 8 : (bit + 1) * width // 8] = 220 if index >> bit & 1 else 30
    return video


def read_numbers(video: np.ndarray) -> list[int]:
    """The indices that frames of ``numbered`` show."""
    width = video.shape[2]
    centres = [(2 * bit + 1) * width // 16 for bit in range(8)]
    return [sum((frame[:, x].mean() > 128) << bit for bit, x in enumerate(centres)) for frame in video]


def still(frames: int = 24, *, size: tuple[int, int] = (64, 64), level: int | None = None) -> np.ndarray:
    """One picture, repeated; of one grey level if given."""
    picture = moving_square(1, size=size) if level is None else np.full((1, size[1], size[0], 3), level, np.uint8)
    return np.repeat(picture, frames, axis=0)


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    fps: Fraction | int = 12,
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
) -> Path:
    """Encode frames [T, H, W, 3]; ``times`` are their presentation times in units of 1 / fps."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.options = options if options is not None else {"preset": "veryfast", "crf": "14", "threads": "1"}
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixel_format)
            if times is not None:
                picture.pts, picture.time_base = times[index], 1 / Fraction(fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def flag_key_frames(source: Path, target: Path, every: int) -> Path:
    """Copy a video's packets, every so many of them flagged as a key frame, which most of them are not."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        stream = before.streams.video[0]
        copied = after.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in before.demux(stream) if packet.dts is not None):
            packet.is_keyframe = packet.is_keyframe or number % every == 0
            packet.stream = copied
            after.mux(packet)
    return target


def write_table(path: Path, rows: Sequence[tuple[str, ...]], *, header: tuple[str, ...] = ("path", "caption")) -> Path:
    """A CSV file, such as a captions.csv."""
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path
