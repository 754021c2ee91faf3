"""Clips to train and measure a video tokenizer on: decoded from files, or procedural."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import UInt8
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lumos.compression import CELL, TEMPORAL_FACTOR
from lumos.config import require
from pipelines import sample_corpus as corpus
from pipelines.data.settings import SourceConfig
from pipelines.errors import UserError
from pipelines.training.tokenizer.procedural import texture_clip

VIDEO_SUFFIXES = SourceConfig.extensions
SAMPLE_CORPUS = "sample-corpus"  # stands for held-out clips of the demo's corpus where a folder could be named

Clips = UInt8[Tensor, "batch time height width 3"]
Resize = Literal["area", "bilinear", "bicubic"]

# Streams of random numbers that a run's seed is split into.
_CORPUS_STREAM, _TEXTURE_STREAM, _BATCH_STREAM = 0, 1, 2
_SPAN = 1_000_000  # seeds of the sample corpus's clips: training below it, held-out clips above


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """What to train on."""

    videos: str | None = None  # a video or a folder of them, searched recursively; none: procedural clips alone
    max_video_clips: int = 2000  # taken from videos
    corpus_clips: int = 1280  # different clips of the sample corpus to render, as H.264 files read back
    texture_clips: int = 1500  # different procedural textures and sprites to draw
    size: int = 48  # height and width of a clip, px; a multiple of 8
    num_frames: int = 13  # of a clip, 1 + 4k
    fps: float = 12.0  # that videos are brought to
    corpus_share: float = 0.7  # of a batch, drawn from the sample corpus, 0..1; the others share the rest evenly
    aligned_share: float = 0.85  # of the sample corpus's clips, that keep their place on the grid of cells, as the demo
    # curates them; the others are shifted, 0..1

    def __post_init__(self) -> None:
        for name in ("max_video_clips", "corpus_clips", "texture_clips"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("corpus_share", "aligned_share"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; it must be in 0..1")
        require(
            self.size >= 16 and self.size % CELL == 0,
            f"size is {self.size}; it must be a multiple of {CELL} px, at least 16",
        )
        require(
            self.num_frames >= 5 and self.num_frames % TEMPORAL_FACTOR == 1,
            f"num_frames is {self.num_frames}; it must be 1 + 4k, at least 5",
        )
        require(self.fps > 0, f"fps is {self.fps}; it must be positive")
        if self.corpus_share > 0:
            require(self.corpus_clips > 0, "corpus_clips is 0 while corpus_share is not; set one of them")
            require(
                self.num_frames <= corpus.NUM_FRAMES,
                f"num_frames is {self.num_frames}; clips of the sample corpus have {corpus.NUM_FRAMES}",
            )
        require(
            self.corpus_share == 1 or bool(self.texture_clips or self.videos),
            "texture_clips is 0, videos is null and corpus_share is below 1; there is nothing to draw",
        )


def list_videos(source: str) -> list[Path]:
    """The video files of a folder, sorted, or the one file named.

    Raises:
        UserError: There is no such path, or no video in it.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"videos: {source} is neither a file nor a folder; name a video or a folder of videos")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"videos: {source} holds no videos ({', '.join(VIDEO_SUFFIXES)}); name another folder")
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
    try:
        for frame in _at_rate(path, fps):
            frames.append(fit(torch.from_numpy(frame)[None], height, width, resize=resize))
            if max_frames is not None and len(frames) >= max_frames:
                break
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"video {path} cannot be decoded ({error}); remove it or repair it") from error
    if not frames:
        raise UserError(f"video {path} has no frames; remove it")
    return np.asarray(torch.cat(frames).numpy())


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


def corpus_clips(
    specs: list[corpus.ClipSpec], *, size: int, num_frames: int, label: str, resizes: tuple[Resize, ...] = ("area",)
) -> UInt8[Tensor, "clips time size size 3"]:
    """Clips of the sample corpus as a user has them: rendered, coded as H.264, decoded, resized in each way in turn."""
    clips = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for index, spec in enumerate(tqdm(specs, desc=label, unit="clip", leave=False, disable=None)):
            corpus.write_video(path, corpus.render_clip(spec))
            resize = resizes[index % len(resizes)]
            clip = read_video(path, height=size, width=size, fps=corpus.FPS, max_frames=num_frames, resize=resize)
            clips.append(torch.from_numpy(clip))
    return torch.stack(clips)


def held_out_corpus_specs(seed: int, count: int) -> list[corpus.ClipSpec]:
    """Clips of the sample corpus that no training run draws: half of held-out combinations, half by other seeds."""
    held_out = corpus.held_out_specs(_SPAN + seed)[: count // 2]
    return held_out + corpus.sample_specs(_SPAN + seed, count - len(held_out))


class ClipPools:
    """All clips of a run in memory, and the batches drawn from them; a batch depends on (seed, step) alone."""

    def __init__(self, source: ClipSource, seed: int) -> None:
        """Render and read everything.

        Raises:
            UserError: `source.videos` is missing, empty, unreadable, or has no clip of `num_frames` frames.
        """
        self.source, self.seed = source, seed
        margin = max(8, source.size // 3)  # room for random crops
        side, frames = source.size + margin, source.num_frames
        self.others: list[Tensor] = []
        if source.videos is not None and source.corpus_share < 1:
            self.others.append(_video_clips(source, side))
        if source.texture_clips and source.corpus_share < 1:
            bar = tqdm(range(source.texture_clips), desc="draw textures", unit="clip", leave=False, disable=None)
            drawn = [
                texture_clip(np.random.default_rng([seed, _TEXTURE_STREAM, i]), num_frames=frames, side=side)
                for i in bar
            ]
            self.others.append(torch.from_numpy(np.stack(drawn)))
        self.corpus: Tensor | None = None  # [clips, 2, T, H, W, 3]: as decoded, as drawn
        if source.corpus_share > 0:
            specs = corpus.sample_specs(seed % _SPAN, source.corpus_clips)
            clips = corpus_clips(
                specs,
                size=source.size,
                num_frames=frames,
                label="render sample corpus",
                resizes=("area", "bilinear", "area", "bicubic"),
            )
            pictures = [torch.from_numpy(corpus.render_clip(spec)[:frames]) for spec in specs]
            without_losses = torch.stack([fit(clip, source.size, source.size) for clip in pictures])
            self.corpus = torch.stack([clips, without_losses], dim=1)

    def batch(self, step: int, batch_size: int) -> tuple[Clips, Clips]:
        """What the tokenizer sees in one step, and what it should give back, uint8.

        The first is the second after the losses of coding, resizing and film grain: equal content is to get equal
        codes whatever its noise.
        """
        generator = np.random.default_rng([self.seed, _BATCH_STREAM, step])
        num_corpus = 0 if self.corpus is None else round(self.source.corpus_share * batch_size)
        pairs = [self._corpus_pair(generator) for _ in range(num_corpus)]
        for index in range(batch_size - num_corpus):
            clip = self._other_clip(self.others[index % len(self.others)], generator)
            pairs.append(torch.stack([clip, clip]))
        seen, wanted = torch.stack(pairs, dim=1)
        noise = generator.standard_normal(seen.shape, dtype=np.float32)
        noise *= np.minimum(generator.exponential(1.0, (len(seen), 1, 1, 1, 1)), 4.0)  # units of pixel values
        return (seen.float() + torch.from_numpy(noise)).round().clamp(0, 255).to(torch.uint8), wanted

    def _corpus_pair(self, generator: Generator) -> Tensor:
        assert self.corpus is not None
        pair = self.corpus[int(generator.integers(len(self.corpus)))]
        if generator.random() < self.source.aligned_share:
            return pair
        size, reach = self.source.size, 4
        images = rearrange(pair.float(), "p t h w c -> (p t) c h w")
        padded = F.pad(images, (reach,) * 4, mode="reflect")
        top, left = (int(value) for value in generator.integers(0, 2 * reach + 1, 2))
        shifted = padded[:, :, top : top + size, left : left + size].to(torch.uint8)
        return rearrange(shifted, "(p t) c h w -> p t h w c", p=2)

    def _other_clip(self, pool: Tensor, generator: Generator) -> Tensor:
        size = self.source.size
        clip = pool[int(generator.integers(len(pool)))]
        top, left = (int(generator.integers(0, extent - size + 1)) for extent in clip.shape[1:3])
        clip = clip[:, top : top + size, left : left + size]
        flips = [dim for dim in range(3) if generator.random() < 0.5]
        clip = clip.flip(flips)
        return clip.transpose(1, 2) if generator.random() < 0.5 else clip


def _video_clips(source: ClipSource, side: int) -> Tensor:
    assert source.videos is not None
    clips: list[NDArray[np.uint8]] = []
    for path in tqdm(list_videos(source.videos), desc="read videos", unit="file", leave=False, disable=None):
        frames = read_video(path, height=side, width=side, fps=source.fps)
        clips += list(cut_clips(frames, source.num_frames))
        if len(clips) >= source.max_video_clips:
            break
    if not clips:
        raise UserError(
            f"videos: no video of {source.videos} has {source.num_frames} frames at {source.fps:g} fps; "
            "name longer videos or lower num_frames"
        )
    return torch.from_numpy(np.stack(clips[: source.max_video_clips]))


def cut_clips(frames: NDArray[np.uint8], num_frames: int) -> NDArray[np.uint8]:
    """The whole clips [clips, num_frames, H, W, 3] that a video [T, H, W, 3] is cut into."""
    count = len(frames) // num_frames
    return frames[: count * num_frames].reshape(count, num_frames, *frames.shape[1:])
