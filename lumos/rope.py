"""Rotary positions: 1-D, naive 3-D, M-RoPE and MM-RoPE as one family, told apart by a table.

Grid tokens (codes and row ends) may take each frequency's position from the time, height or width axis; every other
token rotates by its index in the sequence. The variants differ in how frequencies are shared out among the axes,
whether positions are scaled per axis, and whether they start at the text's position or at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lumos.config import ModelConfig, RopeKind
from lumos.layout import SequenceLayout

# One meta group of 16 frequencies, shared out T:H:W = 2:3:3 (paper, MM-RoPE). 0 = t, 1 = h, 2 = w.
_META_GROUP = (0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2)


@dataclass(frozen=True)
class RopeVariant:
    """A row of the table below."""

    spatial: bool  # grid tokens have (t, h, w) positions at all
    interleaved: bool  # every axis spans the whole spectrum, instead of one contiguous band each
    scaled: bool  # positions are multiplied by ModelConfig.position_scale
    offset: bool  # positions start at the index of the first grid token


VARIANTS: dict[RopeKind, RopeVariant] = {
    "1d": RopeVariant(spatial=False, interleaved=False, scaled=False, offset=False),
    "3d": RopeVariant(spatial=True, interleaved=False, scaled=False, offset=False),
    "m": RopeVariant(spatial=True, interleaved=False, scaled=False, offset=True),
    "mm": RopeVariant(spatial=True, interleaved=True, scaled=True, offset=True),
}


def frequency_axis(kind: RopeKind, num_frequencies: int) -> Int64[Tensor, " frequencies"]:
    """The axis (0 = t, 1 = h, 2 = w) from which each frequency of a grid token takes its position."""
    groups = torch.tensor(_META_GROUP).repeat(-(-num_frequencies // len(_META_GROUP)))[:num_frequencies]
    return groups if VARIANTS[kind].interleaved else groups.sort().values


def position_ids(layout: SequenceLayout, config: ModelConfig) -> Int64[Tensor, "tokens 3"]:
    """Position of every token along (t, h, w). Tokens off the grid have their sequence index on all three axes.

    The offset of all grid tokens is the index of the first grid token of the document; it is not advanced from frame
    to frame, and the row-end column counts as a column (model.md, section 3).
    """
    with torch.device("cpu"):  # whatever the caller's default is, as the table is kept
        return _position_ids(layout, config.rope, tuple(config.position_scale))


@lru_cache(maxsize=256)
def _position_ids(layout: SequenceLayout, rope: RopeKind, position_scale: tuple[int, ...]) -> Tensor:
    variant = VARIANTS[rope]
    positions = torch.arange(layout.length)[:, None].repeat(1, 3)
    if not variant.spatial or not layout.frames:
        return positions
    scale = torch.tensor(position_scale if variant.scaled else (1, 1, 1))
    offset = layout.frames[0].grid_start if variant.offset else 0
    for t, frame in enumerate(layout.frames):
        grid = torch.cartesian_prod(torch.tensor([t]), torch.arange(frame.rows), torch.arange(frame.cols + 1))
        positions[frame.grid_start : frame.grid_start + frame.grid_size] = grid * scale + offset
    return positions


def rotary_tables(
    positions: Int64[Tensor, "tokens 3"], config: ModelConfig
) -> tuple[Float[Tensor, "tokens half"], Float[Tensor, "tokens half"]]:
    """Cosine and sine of every token's angles, float32; the two halves of a head share them."""
    half = config.head_dim // 2
    device = positions.device
    exponent = torch.arange(half, dtype=torch.float32, device=device) * 2 / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponent)
    axis = frequency_axis(config.rope, half).to(device)
    angles = positions.to(torch.float32)[:, axis] * inv_freq
    return angles.cos(), angles.sin()


def packed_tables(
    layouts: Sequence[SequenceLayout], config: ModelConfig, device: torch.device
) -> tuple[Float[Tensor, "tokens half"], Float[Tensor, "tokens half"]]:
    """Rotary tables of packed documents, each from its start; those of the last few batches are kept on the device."""
    t, h, w = config.position_scale  # a list, perhaps, of which no key can be made
    return _packed_tables(tuple(layouts), replace(config, position_scale=(t, h, w)), device)


@lru_cache(maxsize=8)
def _packed_tables(
    layouts: tuple[SequenceLayout, ...], config: ModelConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # they outlive the mode they are first asked for in
        positions = [_device_positions(layout, config.rope, config.position_scale, device) for layout in layouts]
        return rotary_tables(torch.cat(positions).to(torch.int64), config)


@lru_cache(maxsize=256)
def _device_positions(
    layout: SequenceLayout, rope: RopeKind, position_scale: tuple[int, ...], device: torch.device
) -> Tensor:
    with torch.device("cpu"):
        return _position_ids(layout, rope, position_scale).to(device, torch.int32)


def rotate(
    x: Float[Tensor, "tokens heads head_dim"], cos: Float[Tensor, "tokens half"], sin: Float[Tensor, "tokens half"]
) -> Float[Tensor, "tokens heads head_dim"]:
    """Rotate channel i with channel i + head_dim/2 (the half-split kind); tables in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
