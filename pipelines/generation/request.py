"""One video that is asked for, in plain values that travel between processes, and what comes back."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lumos.compression import VideoSize
from lumos.config import SamplingConfig
from lumos.encoder import RequestEncoder
from lumos.sampling import GenerationRequest
from pipelines.config import config_hash
from pipelines.generation.config import VideoFormat


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """A prompt with everything that decides its video, the model apart.

    Raises:
        ValueError: if the format cannot hold the video.
    """

    prompt: str
    seed: int
    size: VideoSize
    sampling: SamplingConfig
    format: VideoFormat = "mp4"

    def __post_init__(self) -> None:
        """Check what needs no model."""
        if self.format == "png" and self.size.num_frames != 1:
            raise ValueError(f"format png holds one frame, num_frames is {self.size.num_frames}: use mp4 or gif")

    @property
    def batch_kind(self) -> tuple[VideoSize, int]:
        """What requests must share to be drawn together."""
        return self.size, self.sampling.num_steps

    def encode(self, encoder: RequestEncoder) -> GenerationRequest:
        """As the sampler takes it.

        Raises:
            ValueError: if it does not fit the model.
        """
        return encoder.encode(self.prompt, size=self.size, seed=self.seed, sampling=self.sampling)

    def config_hash(self, model_identity: dict[str, Any]) -> str:
        """Names everything that decides the video but prompt and seed.

        Args:
            model_identity: what decides it on the model's side (``ModelCard.identity``).
        """
        settings = {"size": asdict(self.size), "sampling": asdict(self.sampling), "format": self.format}
        return config_hash({"model": model_identity, **settings})


@dataclass(frozen=True, kw_only=True)
class Video:
    """A finished video."""

    data: bytes  # the file
    batch_size: int  # videos drawn together with it
    run_s: float  # seconds its batch took


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why there is no video. A value and not an exception: Serve logs every exception with its traceback."""

    reason: Literal["full", "timeout", "invalid", "failed"]
    message: str
    retry_after_s: float = 0.0  # for "full"
