"""Clips of real pictures to train a tokenizer on: cut from videos at several sizes, and filmed from photographs."""

from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipelines.errors import UserError
from pipelines.training.tokenizer.files import fit, list_photos, list_videos, read_frames
from pipelines.training.tokenizer.procedural import fractal_noise

_MAX_PHOTO = 1600  # px, longer side that photographs are kept at
_LEVELS = 4  # of a photograph: each half the size of the one before


def crop_clips(
    source: str, generator: Generator, *, heights: tuple[int, ...], side: int, num_frames: int, fps: float, limit: int
) -> UInt8[Tensor, "clips time side side 3"]:
    """Clips from random places of videos, each video read at every height; a video gives clips by its length.

    None is enlarged: a video of fewer rows than a height is read as it is.

    Raises:
        UserError: `source` is missing, unreadable, or none of its videos has `num_frames` frames at `fps`.
    """
    paths = list_videos(source)
    clips: list[NDArray[np.uint8]] = []
    for height in heights:
        spans: list[NDArray[np.uint8]] = []
        for path in tqdm(paths, desc=f"read videos, {height} px", unit="file", leave=False, disable=None):
            frames = np.concatenate([frame.numpy() for frame in read_frames(path, fps, height=height)])
            if min(frames.shape[1:3]) >= side:
                starts = range(0, len(frames) - num_frames + 1, num_frames)
                spans += [frames[start : start + num_frames] for start in starts]
        for index in range(limit // len(heights) if spans else 0):
            clips.append(_busy_crop(spans[index % len(spans)], generator, side))
    if not clips:
        raise UserError(
            f"videos: no video of {source} has {num_frames} frames at {fps:g} fps, {side}x{side} px; "
            "name longer or larger videos or lower num_frames"
        )
    return torch.from_numpy(np.stack(clips))


def _busy_crop(frames: NDArray[np.uint8], generator: Generator, side: int) -> NDArray[np.uint8]:
    """Of two random places the one with more to see: most of many a video is wall or sky."""
    crops = []
    for _ in range(2):
        top, left = (int(generator.integers(0, extent - side + 1)) for extent in frames.shape[1:3])
        crops.append(frames[:, top : top + side, left : left + side])
    return max(crops, key=lambda crop: float(crop[::4].std(axis=(0, 1, 2)).sum()))


def photo_clips(
    source: str, generator: Generator, *, count: int, side: int, num_frames: int
) -> UInt8[Tensor, "clips time side side 3"]:
    """Clips of photographs under a moving camera; a third has a second photograph moving before it.

    Raises:
        UserError: `source` is missing, has no photographs, or one cannot be read.
    """
    photos = [
        _pyramid(path, side)
        for path in tqdm(list_photos(source), desc="read photographs", unit="file", leave=False, disable=None)
    ]
    bar = tqdm(range(count), desc="film photographs", unit="clip", leave=False, disable=None)
    return torch.from_numpy(np.stack([_film(photos, index, generator, num_frames, side) for index in bar]))


def _pyramid(path: Path, side: int) -> list[Tensor]:
    """A photograph as float32 [3, H, W] in 0..255, and halves of it while they are large enough to be filmed."""
    try:
        with av.open(str(path)) as container:
            picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (av.error.FFmpegError, OSError, IndexError, StopIteration) as error:
        raise UserError(f"photograph {path} cannot be decoded ({error}); remove it or repair it") from error
    height, width = picture.shape[:2]
    scale = min(1.0, _MAX_PHOTO / max(height, width))
    height, width = round(height * scale), round(width * scale)
    if min(height, width) < side:
        raise UserError(f"photograph {path} is {width}x{height} px; clips of it have {side} px: remove it")
    image = fit(torch.from_numpy(np.ascontiguousarray(picture))[None], height, width)[0].permute(2, 0, 1).float()
    levels = [image]
    while len(levels) < _LEVELS and min(levels[-1].shape[1:]) >= 2 * side:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def _film(
    photos: list[list[Tensor]], index: int, generator: Generator, num_frames: int, side: int
) -> NDArray[np.uint8]:
    frames = _camera(photos[index % len(photos)], generator, num_frames, side)
    if generator.random() < 0.33:  # parallax, or something that passes by
        nearer = _camera(photos[int(generator.integers(len(photos)))], generator, num_frames, side)
        shape = fractal_noise(generator, 2 * side, exponent=3.0) - float(generator.normal(0.5, 0.5))
        edge = torch.from_numpy(shape[None]) * float(generator.choice([5.0, 20.0, 60.0]))
        mask = torch.sigmoid(_camera([edge], generator, num_frames, side))
        frames = frames + mask * (nearer - frames)
    values = frames.permute(0, 2, 3, 1).numpy() / 255
    values = np.clip(values, 0, 1) ** float(np.exp(generator.normal(0, 0.25)))  # another exposure
    if generator.random() < 0.1:
        fade = np.linspace(generator.uniform(0.1, 1), generator.uniform(0.1, 1), num_frames, dtype=np.float32)
        values = values * fade[:, None, None, None]
    if generator.random() < 0.4:
        values = values + generator.normal(0, generator.uniform(0.002, 0.015), values.shape).astype(np.float32)
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _camera(levels: list[Tensor], generator: Generator, num_frames: int, side: int) -> Tensor:
    """Film a picture, whole or a part of it, with a camera that pans, zooms and turns: [num_frames, C, side, side]."""
    level = int(generator.integers(len(levels)))
    image = levels[level]
    height, width = image.shape[1:]
    most = max(1.0, min(1.9, min(height, width) / side))
    scale = float(generator.uniform(1.0, most))  # px of the picture for one of the clip
    still = generator.random() < 0.2
    speed = 0.0 if still else float(min(generator.exponential(1.5), 8.0))  # px of the clip per frame
    heading = generator.uniform(0, 2 * np.pi)
    zoom_rate, turn_rate = (0.0, 0.0) if still else generator.normal(0, [0.006, 0.004])
    time = np.arange(num_frames, dtype=np.float32) - (num_frames - 1) / 2
    zoom, angle = scale * np.exp(zoom_rate * time), turn_rate * time
    center_x, center_y = (
        generator.uniform(min(side * scale, extent) / 2, extent - min(side * scale, extent) / 2)
        for extent in (width, height)
    )
    x = center_x + speed * scale * time * np.cos(heading)
    y = center_y + speed * scale * time * np.sin(heading)
    # In units of the picture, -1..1 from edge to edge.
    rows = [
        [zoom * np.cos(angle) * side / width, -zoom * np.sin(angle) * side / width, 2 * x / width - 1],
        [zoom * np.sin(angle) * side / height, zoom * np.cos(angle) * side / height, 2 * y / height - 1],
    ]
    affine = torch.from_numpy(np.array(rows, dtype=np.float32).transpose(2, 0, 1).copy())
    grid = F.affine_grid(affine, [num_frames, len(image), side, side], align_corners=False)
    source = image[None].expand(num_frames, -1, -1, -1)
    return F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)
