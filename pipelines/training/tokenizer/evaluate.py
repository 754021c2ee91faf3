"""Measures a video tokenizer: how much it loses, and how many of its codes it uses."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from lumos.compression import CELL, TEMPORAL_FACTOR
from lumos.config import require
from lumos.tokenizers import TokenizerConfig, VideoTokenizer
from pipelines import sample_corpus as corpus
from pipelines.errors import UserError
from pipelines.media import psnr, ssim
from pipelines.tokenizers import load_tokenizer
from pipelines.training.tokenizer.data import SAMPLE_CORPUS, corpus_clips, cut_clips, held_out_corpus_specs
from pipelines.training.tokenizer.files import list_videos, read_video

_BATCH = 8  # clips of one call; the last batch is padded to it


@dataclass(frozen=True, kw_only=True)
class TokenizerEvaluateConfig:
    """What to measure a tokenizer on."""

    KIND: ClassVar[str] = "tokenizer-evaluation"

    videos: str = SAMPLE_CORPUS  # a video, a folder of videos, or "sample-corpus" for held-out clips of that
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    height: int = 48  # of the frames, px; a multiple of 8
    width: int = 48
    fps: float = 12.0
    clip_frames: int = corpus.NUM_FRAMES  # videos are cut into clips of so many frames, 1 + 4k
    max_clips: int = 128  # of each video, and of the sample corpus
    seed: int = 0  # of the sample corpus
    output: str | None = None  # JSON file for the result

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size = getattr(self, name)
            require(size >= CELL and size % CELL == 0, f"{name} is {size}; it must be a positive multiple of {CELL} px")
        require(
            self.clip_frames >= 1 and self.clip_frames % TEMPORAL_FACTOR == 1,
            f"clip_frames is {self.clip_frames}; it must be 1 + 4k",
        )
        require(self.fps > 0, f"fps is {self.fps}; it must be positive")
        require(self.max_clips >= 1, f"max_clips is {self.max_clips}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a tokenizer does to some clips."""

    name: str  # of the clips
    clips: int
    psnr: float  # dB, of a whole clip; mean over the clips
    psnr_min: float
    ssim: float  # of luma, mean over the frames
    codes_used: int  # different codes that occur
    codebook_size: int
    entropy_bits: float  # of the codes' frequencies
    encode_ms: float  # milliseconds a frame, median over batches, here and now
    decode_ms: float

    def summary(self) -> str:
        """Figures on one line."""
        share = self.codes_used / self.codebook_size
        return (
            f"PSNR {self.psnr:.2f} dB (lowest {self.psnr_min:.2f}), SSIM {self.ssim:.4f}, "
            f"{self.codes_used} of {self.codebook_size} codes "
            f"({share:.0%}), {self.entropy_bits:.2f} bits, {self.encode_ms:.1f} and {self.decode_ms:.1f} ms a frame"
        )

    def __str__(self) -> str:
        return f"{self.name}: {self.clips} clips, {self.summary()}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measurements of one tokenizer: per video, and of all clips together (last)."""

    weights_hash: str
    rows: tuple[Measurement, ...]

    def __str__(self) -> str:
        head = f"{'clips':>5} {'PSNR':>6} {'lowest':>6} {'SSIM':>6} {'codes':>11} {'bits':>5}"
        head += f" {'encode':>6} {'decode':>6}  name"
        lines = [
            f"{row.clips:5d} {row.psnr:6.2f} {row.psnr_min:6.2f} {row.ssim:6.4f} "
            f"{row.codes_used:5d}/{row.codebook_size:<5d} {row.entropy_bits:5.2f} "
            f"{row.encode_ms:6.1f} {row.decode_ms:6.1f}  {row.name}"
            for row in self.rows
        ]
        return "\n".join([head, *lines, "PSNR in dB of whole clips; encode and decode in ms a frame, on this machine"])


def evaluate_tokenizer(config: TokenizerEvaluateConfig) -> Evaluation:
    """Encode and decode videos and measure the loss.

    Raises:
        UserError: The tokenizer or the videos are missing or unusable.
    """
    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"tokenizer: {error}") from error
    clips: dict[str, Tensor] = {}
    if config.videos == SAMPLE_CORPUS:
        if (config.height, config.width) != (48, 48):
            raise UserError(f"videos: {SAMPLE_CORPUS} has 48x48 px, not {config.width}x{config.height}")
        specs = held_out_corpus_specs(config.seed, config.max_clips)
        name = f"{SAMPLE_CORPUS} (held out)"
        clips[name] = corpus_clips(specs, size=48, num_frames=config.clip_frames, label="render sample corpus")
    else:
        for path in tqdm(list_videos(config.videos), desc="read videos", unit="file", leave=False, disable=None):
            limit = config.max_clips * config.clip_frames
            frames = read_video(path, height=config.height, width=config.width, fps=config.fps, max_frames=limit)
            cut = cut_clips(frames, config.clip_frames)
            if len(cut):
                name = path.name if path == Path(config.videos) else str(path.relative_to(config.videos))
                clips[name] = torch.from_numpy(cut)
        if not clips:
            raise UserError(f"videos: none of {config.videos} has {config.clip_frames} frames at {config.fps:g} fps")
    seen = {name: _see(tokenizer, value) for name, value in clips.items()}
    rows = [_sum_up(tokenizer, [value], name) for name, value in seen.items()]
    if len(seen) > 1:
        rows.append(_sum_up(tokenizer, list(seen.values()), "all"))
    result = Evaluation(weights_hash=tokenizer.weights_hash, rows=tuple(rows))
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return result


def measure(tokenizer: VideoTokenizer, clips: Tensor, *, name: str) -> Measurement:
    """Measure on clips uint8 [clips, T, H, W, 3]."""
    return _sum_up(tokenizer, [_see(tokenizer, clips)], name)


@dataclass(frozen=True)
class _Seen:
    """What was measured on clips of one size."""

    psnrs: list[float]  # of clips
    ssims: list[float]  # of frames
    counts: Tensor  # of each code
    encode_s: list[float]  # a frame, of batches
    decode_s: list[float]


def _see(tokenizer: VideoTokenizer, clips: Tensor) -> _Seen:
    seen = _Seen([], [], torch.zeros(tokenizer.codebook_size, dtype=torch.long), [], [])
    for batch in clips.split(_BATCH):
        frames = batch.shape[0] * batch.shape[1]
        started = time.perf_counter()
        codes = tokenizer.encode(batch)
        encoded = time.perf_counter()
        decoded = tokenizer.decode(codes)
        seen.encode_s.append((encoded - started) / frames)
        seen.decode_s.append((time.perf_counter() - encoded) / frames)
        seen.counts.add_(torch.bincount(codes.flatten(), minlength=tokenizer.codebook_size))
        pairs = list(zip(batch.numpy(), decoded.numpy(), strict=True))
        seen.psnrs.extend(psnr(clip, other) for clip, other in pairs)
        seen.ssims.extend(ssim(*frames) for clip, other in pairs for frames in zip(clip, other, strict=True))
    return seen


def _sum_up(tokenizer: VideoTokenizer, all_seen: Sequence[_Seen], name: str) -> Measurement:
    psnrs, ssims, encode_s, decode_s = (
        [value for seen in all_seen for value in getattr(seen, figure)]
        for figure in ("psnrs", "ssims", "encode_s", "decode_s")
    )
    counts = torch.stack([seen.counts for seen in all_seen]).sum(dim=0)
    shares = counts[counts > 0] / counts.sum()
    return Measurement(
        name=name,
        clips=len(psnrs),
        psnr=statistics.fmean(psnrs),
        psnr_min=min(psnrs),
        ssim=statistics.fmean(ssims),
        codes_used=int((counts > 0).sum()),
        codebook_size=tokenizer.codebook_size,
        entropy_bits=float(-(shares * shares.log2()).sum()),
        encode_ms=1e3 * statistics.median(encode_s),
        decode_ms=1e3 * statistics.median(decode_s),
    )
