"""Videos drawn from a seed, to train a tokenizer on: natural-like textures under a moving camera, and sprites.

A tokenizer that saw only the sample corpus would fail on filmed material. The pictures here have what such material has
and a corpus of flat shapes lacks: power spectra that fall with frequency, edges at every scale, muted correlated
colours, shading, and smooth motion of camera and objects. No recorded image is involved.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray

Image = NDArray[np.float32]  # [side, side, 3] or [side, side], about 0..1

# Luma, blue and red chroma to RGB (ITU-R BT.601).
_RGB_OF_YCC = np.array([[1, 0, 1.402], [1, -0.344, -0.714], [1, 1.772, 0]], dtype=np.float32)


def texture_clip(generator: Generator, *, num_frames: int, side: int) -> NDArray[np.uint8]:
    """Draw one clip, uint8 [num_frames, side, side, 3], RGB; the generator decides everything."""
    canvas = 2 * side
    image = _scene(generator, canvas)
    frames = _camera(generator, image, num_frames=num_frames, side=side)
    if generator.random() < 0.45:
        frames = _add_sprites(generator, frames)
    if generator.random() < 0.12:
        fade = np.linspace(generator.uniform(0.1, 1), generator.uniform(0.1, 1), num_frames, dtype=np.float32)
        frames = frames * fade[:, None, None, None]
    if generator.random() < 0.4:
        frames = frames + generator.normal(0, generator.uniform(0.002, 0.02), frames.shape).astype(np.float32)
    return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def _scene(generator: Generator, side: int) -> Image:
    """A still picture: one or two materials with a border between them, under uneven light."""
    image = _material(generator, side)
    for _ in range(int(generator.integers(0, 3))):
        border = fractal_noise(generator, side, exponent=generator.uniform(1.5, 3.0))
        if generator.random() < 0.5:  # a horizon
            border = border * 0.3 + np.linspace(-2, 2, side, dtype=np.float32)[:, None]
        sharpness = generator.choice([2.0, 8.0, 40.0])
        share = 1 / (1 + np.exp(-np.clip(sharpness * (border - generator.normal(0, 0.7)), -30, 30)))
        image = image + share[:, :, None] * (_material(generator, side) - image)
    light = 1 + generator.uniform(0, 0.25) * fractal_noise(generator, side, exponent=3.0)
    return np.asarray(image * light[:, :, None], dtype=np.float32)


def _material(generator: Generator, side: int) -> Image:
    kinds: list[Callable[[Generator, int], Image]] = [_noise_material, _leaves, _gradient, _stripes]
    return kinds[int(generator.choice(4, p=[0.45, 0.3, 0.15, 0.1]))](generator, side)


def fractal_noise(generator: Generator, side: int, *, exponent: float) -> Image:
    """A random field whose amplitude falls as frequency ** -exponent / 2, mean 0 and variance 1, [side, side]."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(generator.standard_normal((side, side))) * frequency ** (-exponent / 2)
    field = np.fft.irfft2(spectrum, s=(side, side))
    return np.asarray(field / (field.std() + 1e-9), dtype=np.float32)


def _noise_material(generator: Generator, side: int) -> Image:
    luma = fractal_noise(generator, side, exponent=generator.uniform(1.6, 3.2))
    if generator.random() < 0.3:  # ridges
        luma = 1 - 2 * np.abs(luma)
    chroma = np.stack([fractal_noise(generator, side, exponent=2.6) for _ in range(2)])
    return _colorise(generator, luma * generator.uniform(0.02, 0.2), chroma * generator.uniform(0, 0.05))


def _leaves(generator: Generator, side: int) -> Image:
    """Dead leaves: overlapping patches with a power law of sizes, which has the edge statistics of photographs."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    image = np.broadcast_to(_color(generator), (side, side, 3)).copy()
    spread = generator.uniform(0.05, 0.3)
    base = _color(generator)
    for _ in range(int(generator.integers(20, 90))):
        radius = min(side / 3, 3.0 * (1 - generator.random()) ** (-1 / 1.5))
        cy, cx = generator.uniform(0, side, 2)
        stretch, angle = generator.uniform(0.4, 1), generator.uniform(0, np.pi)
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / stretch
        distance = np.hypot(u, v) if generator.random() < 0.5 else np.maximum(np.abs(u), np.abs(v))
        share = np.clip(radius - distance + 0.5, 0, 1)[:, :, None]
        color = base + generator.normal(0, spread) + generator.normal(0, spread / 4, 3)
        image += share * (color.astype(np.float32) - image)
    return image + 0.03 * fractal_noise(generator, side, exponent=1.5)[:, :, None]


def _gradient(generator: Generator, side: int) -> Image:
    angle = generator.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.7, 0.7, side, dtype=np.float32)
    ramp = np.clip(0.5 + axis[:, None] * np.sin(angle) + axis[None] * np.cos(angle), 0, 1)[:, :, None]
    return np.asarray(_color(generator) * ramp + _color(generator) * (1 - ramp), dtype=np.float32)


def _stripes(generator: Generator, side: int) -> Image:
    """Bars or squares with sharp edges: windows, bricks, text lines."""
    axis = np.arange(side, dtype=np.float32)
    period, duty = generator.uniform(3, 24, 2), generator.uniform(0.2, 0.8, 2)
    bars = [(axis / period[i]) % 1 < duty[i] for i in range(2)]
    tile = bars[0][:, None] if generator.random() < 0.4 else bars[0][:, None] & bars[1][None]
    return np.asarray(np.where(np.broadcast_to(tile, (side, side))[:, :, None], _color(generator), _color(generator)))


def _color(generator: Generator) -> Image:
    """An RGB colour; four in five are as muted as most of the world is."""
    if generator.random() < 0.2:
        return generator.random(3).astype(np.float32)
    chroma = generator.normal(0, 0.07, 2)
    warm = generator.normal(0, 0.06)  # daylight colours lie between blue and orange
    ycc = np.array([generator.uniform(0.03, 0.97), chroma[0] * 0.5 - warm, chroma[1] * 0.5 + warm], dtype=np.float32)
    return np.asarray(np.clip(_RGB_OF_YCC @ ycc, 0, 1), dtype=np.float32)


def _colorise(generator: Generator, luma: Image, chroma: Image) -> Image:
    ycc = np.stack([luma, chroma[0], chroma[1]], axis=-1)
    return np.asarray(_color(generator) + ycc @ _RGB_OF_YCC.T, dtype=np.float32)


def _camera(generator: Generator, image: Image, *, num_frames: int, side: int) -> Image:
    """Film a picture with a camera that pans, zooms and turns at constant speed, [num_frames, side, side, 3]."""
    still = generator.random() < 0.15
    speed = 0.0 if still else float(generator.exponential(1.0))  # px per frame
    heading = generator.uniform(0, 2 * np.pi)
    zoom_rate, turn_rate = (0.0, 0.0) if still else generator.normal(0, [0.006, 0.004])
    zoom, turn = generator.uniform(0.35, 0.6), generator.normal(0, 0.3)
    time = np.arange(num_frames, dtype=np.float32) - num_frames / 2
    scale = zoom * np.exp(zoom_rate * time)
    angle = turn + turn_rate * time
    limit = 1 - scale.max() * 1.3
    shift = np.clip(np.outer(time * speed / side, [np.cos(heading), np.sin(heading)]), -limit, limit)
    rows = [[scale * np.cos(angle), -scale * np.sin(angle), shift[:, 0]]]
    rows += [[scale * np.sin(angle), scale * np.cos(angle), shift[:, 1]]]
    affine = torch.from_numpy(np.array(rows).transpose(2, 0, 1).astype(np.float32))
    grid = F.affine_grid(affine, [num_frames, 3, side, side], align_corners=False)
    source = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].expand(num_frames, -1, -1, -1)
    frames = F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)
    return np.asarray(frames.permute(0, 2, 3, 1).numpy(), dtype=np.float32)


def _add_sprites(generator: Generator, frames: Image) -> Image:
    """Put one to four flat or shaded figures over a film, each on its own straight way."""
    num_frames, side = frames.shape[:2]
    y, x = np.mgrid[:side, :side].astype(np.float32)
    result = frames.copy()
    for _ in range(int(generator.integers(1, 5))):
        radius = generator.uniform(3, side / 3)
        start, speed = generator.uniform(0, side, 2), generator.normal(0, 1.2, 2)
        corners, angle = int(generator.integers(3, 8)), generator.uniform(0, 2 * np.pi)
        hollow = generator.random() < 0.2
        color, shade = _color(generator), generator.normal(0, 0.1)
        for index in range(num_frames):
            cy, cx = start + speed * index
            v, u = y - cy, x - cx
            if corners == 7:
                distance = np.hypot(u, v)
            else:
                sector = np.pi / corners
                theta = (np.arctan2(v, u) + angle) % (2 * sector) - sector
                distance = np.hypot(u, v) * np.cos(theta) / np.cos(sector)
            share = np.clip(radius - distance + 0.5, 0, 1)
            if hollow:
                share = share * np.clip(distance - 0.6 * radius + 0.5, 0, 1)
            paint = color + shade * (v / radius)[:, :, None]
            result[index] += share[:, :, None] * (paint - result[index])
    return result
