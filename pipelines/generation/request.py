"""One video that is asked for, in plain values that travel between processes, and why there is none."""

import hashlib
import re
import unicodedata
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lumos.compression import TEMPORAL_FACTOR, VideoSize, num_latent_frames
from lumos.config import SamplingConfig, ShortcutConfig
from lumos.encoder import RequestEncoder
from lumos.guidance import GenerationRequest
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
    # uint8 [1 + 4k, H, W, 3] of the video's size, fewer than it has: the frames it begins with; compared by hash.
    given: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    given_hash: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.format == "png" and self.size.num_frames != 1:
            raise ValueError(f"format png holds one frame, num_frames is {self.size.num_frames}: use mp4 or gif")
        if self.given is not None:
            check_given(self.given, self.size)
            object.__setattr__(self, "given_hash", hashlib.sha256(self.given.tobytes()).hexdigest())

    @property
    def kind(self) -> Hashable:
        """What requests must share to be drawn together."""
        return self.size, self.sampling.passes, self.num_given

    @property
    def num_given(self) -> int:
        """Frames given."""
        return 0 if self.given is None else len(self.given)

    def encode(self, encoder: RequestEncoder, given: NDArray[np.int64] | None = None) -> GenerationRequest:
        """As the sampler takes it, with codes of the given frames; a ``ValueError`` if it does not fit the model."""
        return encoder.encode(
            self.prompt, size=self.size, seed=self.seed, sampling=self.sampling, given=given, motion=self.motion
        )

    def config_hash(self, model_identity: dict[str, Any]) -> str:
        """Names everything that decides the video but prompt and seed, ``ModelCard.identity`` included."""
        sampling = asdict(self.sampling)
        if self.sampling.shortcuts in (None, ShortcutConfig()):  # as before there were any; likewise below
            del sampling["shortcuts"]
        if self.sampling.draw_temperature == 1.0:
            del sampling["draw_temperature"]
        settings: dict[str, Any] = {"size": asdict(self.size), "sampling": sampling, "format": self.format}
        if self.motion is not None:
            settings["motion"] = self.motion
        if self.given_hash is not None:
            settings["given"] = {"frames": self.num_given, "sha256": self.given_hash}
        return config_hash({"model": model_identity, **settings})


def check_given(frames: NDArray[np.uint8], size: VideoSize) -> None:
    """Check that a video of a size can begin with these frames; a ``ValueError`` if not."""
    shape = [size.height, size.width, 3]
    if frames.dtype != np.uint8 or frames.ndim != 4 or list(frames.shape[1:]) != shape:
        raise ValueError(f"frames given must be uint8 {['T', *shape]}, got {frames.dtype} {list(frames.shape)}")
    num_latent_frames(len(frames))
    if len(frames) >= size.num_frames:
        raise ValueError(
            f"{len(frames)} frames are given and num_frames is {size.num_frames}: set num_frames to "
            f"{len(frames) + TEMPORAL_FACTOR} or more"
        )


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
