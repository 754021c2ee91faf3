"""One video that is asked for, in plain values that travel between processes, and why there is none."""

import re
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lumos.compression import CELL, num_latent_frames
from lumos.config import SamplingConfig
from pipelines.config import config_hash
from pipelines.media import VideoFormat

_MAX_SLUG = 60  # characters; a file name stays far under the 255 bytes of file systems


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Pixels and frames of a video."""

    width: int
    height: int
    num_frames: int  # 1 + 4k
    fps: float

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The grid of codes (t, h, w) behind the video."""
        return num_latent_frames(self.num_frames), self.height // CELL, self.width // CELL

    def __str__(self) -> str:
        """For messages."""
        return f"{self.width}x{self.height}, {self.num_frames} frames at {self.fps:g} fps"


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """A prompt with everything that decides its video, the model apart.

    Raises:
        ValueError: if the format cannot hold the video, or the prompt is empty.
    """

    prompt: str
    seed: int
    size: VideoSize
    sampling: SamplingConfig
    format: VideoFormat = "mp4"

    def __post_init__(self) -> None:
        """Check what needs no model."""
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        if self.format == "png" and self.size.num_frames != 1:
            raise ValueError(f"format png holds one frame, num_frames is {self.size.num_frames}: use mp4 or gif")

    @property
    def batch_kind(self) -> tuple[VideoSize, int]:
        """What requests must share to be drawn together."""
        return self.size, self.sampling.num_steps

    def config_hash(self, model_identity: dict[str, Any]) -> str:
        """Names everything that decides the video but prompt and seed.

        Args:
            model_identity: what decides it on the model's side (``ModelCard.identity``).
        """
        settings = {"size": asdict(self.size), "sampling": asdict(self.sampling), "format": self.format}
        return config_hash({"model": model_identity, **settings})


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why there is no video. A value and not an exception: Serve logs every exception with its traceback."""

    reason: Literal["full", "lost", "timeout", "invalid", "failed"]
    message: str
    retry_after_s: float = 0.0  # for "full" and "lost"


def file_name(prompt: str, seed: int, suffix: str) -> str:
    """Name for a video, safe on any file system and in HTTP headers: ``a-red-square-3.mp4``.

    Args:
        prompt: any text; what is not an ASCII letter or digit becomes a hyphen, and it is cut to 60 characters.
        seed: sampling seed.
        suffix: file type, without a dot.
    """
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain)[:_MAX_SLUG].strip("-") or "video"
    return f"{slug}-{seed}.{suffix}"
