"""One seed, split into named streams: every random draw of a run has a name, and none depends on what was drawn before.

A stream is found from the seed and its names alone, so a draw is the same after a resume, on another number of workers,
and whatever other parts of the program draw.
"""

import hashlib

import numpy as np
import torch


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed from the run's seed and the stream's names, for example ``(seed, "mask", step, row)``."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_stream(seed: int, *names: str | int) -> np.random.Generator:
    """The named stream as a numpy generator."""
    return np.random.default_rng(stream_seed(seed, *names))


def torch_stream(seed: int, *names: str | int) -> torch.Generator:
    """The named stream as a torch generator on the CPU."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))
