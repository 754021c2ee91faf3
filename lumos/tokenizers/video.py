"""What every video tokenizer offers: uint8 frames [T, H, W, 3] <-> an integer grid [t, h, w], compressed 4x8x8.

An image is t = 1 (`lumos.compression`). Latent frame i depends on frames up to 4i only.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lumos.compression import CELL, num_latent_frames


@runtime_checkable
class VideoTokenizer(Protocol):
    """A pair of functions between frames and codes, and what identifies it."""

    kind: str  # as its config names it: a ``lumos.config.TokenizerKind``
    codebook_size: int  # codes are 0..codebook_size - 1
    compression: tuple[int, int, int]  # frames per latent frame after the first, px per cell in height and in width
    weights_hash: str  # "sha256:" and the hash of the weights file; equal hash, equal codes

    def encode(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Int64[Tensor, "batch t h w"]:
        """Codes of RGB frames.

        Raises:
            ValueError: T is not 1 + 4k, or H or W no multiple of 8.
        """

    def decode(self, codes: Int64[Tensor, "batch t h w"]) -> UInt8[Tensor, "batch time height width 3"]:
        """RGB frames of codes.

        Raises:
            ValueError: A code is out of range.
        """


def check_frames(frames: Tensor) -> tuple[int, int, int]:
    """The latent shape (t, h, w) of a batch of frames.

    Raises:
        ValueError: Not uint8 [batch, T, H, W, 3], T is not 1 + 4k, or H or W is no multiple of 8.
    """
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"expected uint8 frames [batch, T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    _, time, height, width, _ = frames.shape
    for name, size in (("height", height), ("width", width)):
        if size < CELL or size % CELL:
            raise ValueError(f"{name} {size} is not a multiple of {CELL} px; crop or resize the frames")
    return num_latent_frames(time), height // CELL, width // CELL


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Check a batch of codes.

    Raises:
        ValueError: Not an integer array [batch, t, h, w], empty, or a code outside 0..codebook_size - 1.
    """
    if codes.ndim != 4 or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"expected integer codes [batch, t, h, w], got {codes.dtype} {list(codes.shape)}")
    if 0 in codes.shape:
        raise ValueError(f"codes of shape {list(codes.shape)} hold no video")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes range over {low}..{high}; this tokenizer has codes 0..{codebook_size - 1}")


def frames_to_unit(frames: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels 0..255 as float32 -1..1."""
    return frames.float() / 127.5 - 1


def unit_to_frames(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Values -1..1 as pixels 0..255; what lies outside is clipped."""
    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
