"""Frames: how far two videos are apart."""

import math

import numpy as np
from numpy.typing import NDArray

_MAX_PSNR = 99.0  # dB; of equal frames


def psnr(frames: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of pixels 0..255, dB, over all frames; 99 where they are equal."""
    error = float(np.mean((frames.astype(np.float32) - other.astype(np.float32)) ** 2))
    return min(_MAX_PSNR, 10 * math.log10(255**2 / error)) if error else _MAX_PSNR
