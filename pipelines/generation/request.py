"""One video that is asked for, in plain values that travel between processes, and why there is none."""

import re
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lumos.compression import VideoSize
from lumos.config import SamplingConfig
from lumos.encoder import RequestEncoder
from lumos.sampling import GenerationRequest
from pipelines.config import config_hash
from pipelines.media import VideoFormat

_MAX_SLUG = 60  # characters; a file name stays far under the 255 bytes of file systems


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """A prompt with everything that decides its video, the model apart; its format must be able to hold it."""

    prompt: str
    seed: int
    size: VideoSize
    sampling: SamplingConfig
    format: VideoFormat = "mp4"
    motion: int | None = None  # how much is to move, 0..9; None leaves it open

    def __post_init__(self) -> None:
        if self.format == "png" and self.size.num_frames != 1:
            raise ValueError(f"format png holds one frame, num_frames is {self.size.num_frames}: use mp4 or gif")

    def encode(self, encoder: RequestEncoder) -> GenerationRequest:
        """As the sampler takes it; a ``ValueError`` if it does not fit the model."""
        return encoder.encode(self.prompt, size=self.size, seed=self.seed, sampling=self.sampling, motion=self.motion)

    def config_hash(self, model_identity: dict[str, Any]) -> str:
        """Names everything that decides the video but prompt and seed, ``ModelCard.identity`` included."""
        settings: dict[str, Any] = {"size": asdict(self.size), "sampling": asdict(self.sampling), "format": self.format}
        if self.motion is not None:
            settings["motion"] = self.motion
        return config_hash({"model": model_identity, **settings})


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why there is no video. A value and not an exception: Serve logs every exception with its traceback."""

    reason: Literal["full", "lost", "timeout", "invalid", "failed"]
    message: str
    retry_after_s: float = 0.0  # for "full" and "lost"


def file_name(prompt: str, seed: int, suffix: str) -> str:
    """Name for a video, safe on any file system and in HTTP headers: ``a-red-square-3.mp4``.

    What is no ASCII letter or digit in the prompt becomes a hyphen, and it is cut to 60 characters.
    """
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain)[:_MAX_SLUG].strip("-") or "video"
    return f"{slug}-{seed}.{suffix}"
