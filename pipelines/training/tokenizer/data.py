"""Clips to train and measure a video tokenizer on: decoded from files, or procedural."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

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
from pipelines.errors import UserError
from pipelines.training.tokenizer.files import Resize, fit, list_videos, read_video
from pipelines.training.tokenizer.filmed import crop_clips, photo_clips
from pipelines.training.tokenizer.procedural import texture_clip

SAMPLE_CORPUS = "sample-corpus"  # stands for held-out clips of the demo's corpus where a folder could be named

Clips = UInt8[Tensor, "batch time height width 3"]
# Streams of random numbers that a run's seed is split into.
_CORPUS_STREAM, _TEXTURE_STREAM, _BATCH_STREAM, _VIDEO_STREAM, _PHOTO_STREAM = range(5)
_SPAN = 1_000_000  # seeds of the sample corpus's clips: training below it, held-out clips above


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """What to train on."""

    videos: str | None = None  # a video or a folder of them, searched recursively; none: procedural clips alone
    max_video_clips: int = 2000  # taken from videos
    # Heights (px) that videos are brought to; clips are cut from them at random places. Empty: whole frames, at `size`.
    video_heights: tuple[int, ...] = ()
    photos: str | None = None  # a photograph or a folder of them, filmed by a moving camera
    photo_clips: int = 2000  # to film
    corpus_clips: int = 1280  # different clips of the sample corpus to render, as H.264 files read back
    texture_clips: int = 1500  # different procedural textures and sprites to draw
    size: int = 48  # height and width of a clip, px; a multiple of 8
    num_frames: int = 13  # of a clip, 1 + 4k
    fps: float = 12.0  # that videos are brought to
    recolored_share: float = 0.0  # of what is not of the sample corpus: other, mostly stronger colours, 0..1
    corpus_share: float = 0.7  # of a batch, drawn from the sample corpus, 0..1; the rest is drawn from all others alike
    aligned_share: float = 0.85  # of the sample corpus's clips, that keep their place on the grid of cells, as the demo
    # curates them; the others are shifted, 0..1

    def __post_init__(self) -> None:
        for name in ("max_video_clips", "photo_clips", "corpus_clips", "texture_clips"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("recolored_share", "corpus_share", "aligned_share"):
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
            self.corpus_share == 1 or bool(self.texture_clips or self.videos or self.photos),
            "texture_clips is 0, videos and photos are null and corpus_share is below 1; there is nothing to draw",
        )


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
        others: list[Tensor] = []
        if source.videos is not None and source.corpus_share < 1:
            others.append(_video_clips(source, side, np.random.default_rng([seed, _VIDEO_STREAM])))
        if source.photos is not None and source.photo_clips and source.corpus_share < 1:
            generator = np.random.default_rng([seed, _PHOTO_STREAM])
            others.append(photo_clips(source.photos, generator, count=source.photo_clips, side=side, num_frames=frames))
        if source.texture_clips and source.corpus_share < 1:
            bar = tqdm(range(source.texture_clips), desc="draw textures", unit="clip", leave=False, disable=None)
            drawn = [
                texture_clip(np.random.default_rng([seed, _TEXTURE_STREAM, i]), num_frames=frames, side=side)
                for i in bar
            ]
            others.append(torch.from_numpy(np.stack(drawn)))
        self.others = torch.cat(others) if others else None
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
        for _ in range(batch_size - num_corpus):
            clip = self._other_clip(generator)
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

    def _other_clip(self, generator: Generator) -> Tensor:
        assert self.others is not None
        size = self.source.size
        clip = self.others[int(generator.integers(len(self.others)))]
        top, left = (int(generator.integers(0, extent - size + 1)) for extent in clip.shape[1:3])
        clip = clip[:, top : top + size, left : left + size]
        flips = [dim for dim in range(3) if generator.random() < 0.5]
        clip = clip.flip(flips)
        clip = clip.transpose(1, 2) if generator.random() < 0.5 else clip
        share = self.source.recolored_share
        return recolored(clip, generator) if share and generator.random() < share else clip


def recolored(clip: UInt8[Tensor, "time height width 3"], generator: Generator) -> UInt8[Tensor, "time height width 3"]:
    """A clip with its channels in another order and its colours weaker or up to four times as strong."""
    values = clip[..., torch.from_numpy(generator.permutation(3))].float()
    gray = values.mean(dim=-1, keepdim=True)
    strength = float(np.exp(generator.uniform(-0.3, np.log(4))))
    return (gray + strength * (values - gray)).round().clamp(0, 255).to(torch.uint8)


def _video_clips(source: ClipSource, side: int, generator: Generator) -> Tensor:
    assert source.videos is not None
    if source.video_heights:
        return crop_clips(
            source.videos,
            generator,
            heights=source.video_heights,
            side=side,
            num_frames=source.num_frames,
            fps=source.fps,
            limit=source.max_video_clips,
        )
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
