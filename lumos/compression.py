"""The one home of the video tokenizers' compression, 4x8x8, and of counting frames by it; free of torch.

Frame 1 alone becomes the first latent frame and each further group of 4 frames one more, so 1 + 4k frames give 1 + k;
an image is one frame.
"""

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
