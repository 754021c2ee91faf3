"""The one home of the video tokenizers' compression, 4x8x8, and of the sizes of videos under it; free of torch.

Frame 1 alone becomes the first latent frame and each further group of 4 frames one more, so 1 + 4k frames give 1 + k;
an image is one frame.
"""

import re
from dataclasses import dataclass

CELL = 8  # px of a latent cell, in height and in width
TEMPORAL_FACTOR = 4  # frames per latent frame after the first
COMPRESSION = (TEMPORAL_FACTOR, CELL, CELL)


def num_latent_frames(num_frames: int) -> int:
    """Latent frames of ``num_frames`` frames.

    Raises:
        ValueError: if the count is not 1 + 4k; the message names the nearest that are.
    """
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_FACTOR:
        below = max(1, num_frames - (num_frames - 1) % TEMPORAL_FACTOR)
        near = f"{below}" if num_frames < 1 else f"{below} or {below + TEMPORAL_FACTOR}"
        raise ValueError(f"num_frames {num_frames} is not 1 + {TEMPORAL_FACTOR}k: use {near}")
    return 1 + (num_frames - 1) // TEMPORAL_FACTOR


def num_source_frames(num_latents: int) -> int:
    """Frames that ``num_latents`` latent frames stand for."""
    return 1 + TEMPORAL_FACTOR * (num_latents - 1)


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Pixels and frames of a video."""

    width: int
    height: int
    num_frames: int  # 1 + 4k
    fps: float

    @classmethod
    def of_latents(cls, shape: tuple[int, int, int], fps: float) -> "VideoSize":
        """The size of the videos behind a grid of codes (t, h, w)."""
        t, h, w = shape
        return cls(width=w * CELL, height=h * CELL, num_frames=num_source_frames(t), fps=fps)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The grid of codes (t, h, w) behind the video."""
        return num_latent_frames(self.num_frames), self.height // CELL, self.width // CELL

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.num_frames} frames at {self.fps:g} fps"


def parse_size(text: str) -> tuple[int, int]:
    """Width and height, px, of a size written as WIDTHxHEIGHT.

    Raises:
        ValueError: if the text is none.
    """
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if match is None:
        raise ValueError(f"size is {text!r}; write it as WIDTHxHEIGHT, for example 448x256")
    return int(match[1]), int(match[2])
