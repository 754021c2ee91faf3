"""AR-DF tube masking and the masks it is compared with (model.md, section 6; paper, AR-DF).

A mask is drawn over the whole grid of a frame, row-end column included, as in the release. The number of masked cells
is exact: the cells with the smallest of uniform scores are masked.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lumos.config import MaskConfig, MaskKind
from lumos.layout import SequenceLayout
from lumos.vocabulary import Vocabulary


def mask_ratio(timestep: float, min_ratio: float) -> float:
    """Share of masked cells at diffusion time ``timestep`` in [0, 1]: the cosine schedule, clipped from below."""
    return max(min_ratio, math.cos(math.pi * timestep / 2))


def num_masked(num_cells: int, ratio: float) -> int:
    """Number of masked cells: rounded half to even, at least one."""
    return max(1, round(num_cells * ratio))


def mask_from_scores(scores: Float[Tensor, " cells"], ratio: float) -> Bool[Tensor, " cells"]:
    """Mask the cells whose permutation index is below the count: ``argsort(scores) < k``, as the release draws it."""
    return scores.argsort() < num_masked(len(scores), ratio)


def _tube(num_frames: int, num_cells: int, config: MaskConfig, generator: torch.Generator) -> Tensor:
    ratio = mask_ratio(_uniform(generator), config.min_ratio)
    return mask_from_scores(torch.rand(num_cells, generator=generator), ratio).expand(num_frames, num_cells)


def _random(num_frames: int, num_cells: int, config: MaskConfig, generator: torch.Generator) -> Tensor:
    ratio = mask_ratio(_uniform(generator), config.min_ratio)
    scores = torch.rand(num_frames, num_cells, generator=generator)
    return torch.stack([mask_from_scores(frame, ratio) for frame in scores])


def _diffusion_forcing(num_frames: int, num_cells: int, config: MaskConfig, generator: torch.Generator) -> Tensor:
    return torch.cat([_tube(1, num_cells, config, generator) for _ in range(num_frames)])


_KINDS: dict[MaskKind, Callable[[int, int, MaskConfig, torch.Generator], Tensor]] = {
    "tube": _tube,
    "random": _random,
    "diffusion_forcing": _diffusion_forcing,
}


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand(1, generator=generator))


def sample_masked_positions(
    layout: SequenceLayout, config: MaskConfig, generator: torch.Generator
) -> Bool[Tensor, " tokens"]:
    """Draw which tokens of one document, whose frames have one size, are masked.

    From the generator, the stream of this sample, the timestep is drawn first, then cell scores.
    """
    index = layout.grid_index
    frames, cells = index.shape
    masked = torch.zeros(layout.length, dtype=torch.bool)
    if frames:
        masked[index] = _KINDS[config.kind](frames, cells, config, generator)
    return masked


def apply_mask(
    ids: Int64[Tensor, " tokens"], masked_positions: Bool[Tensor, " tokens"], vocabulary: Vocabulary
) -> Int64[Tensor, " tokens"]:
    """Token ids with the masked positions replaced by the mask token."""
    return ids.masked_fill(masked_positions, vocabulary.mask)


def loss_mask(
    ids: Int64[Tensor, " tokens"], masked_positions: Bool[Tensor, " tokens"], vocabulary: Vocabulary
) -> Bool[Tensor, " tokens"]:
    """Where the visual loss is taken: masked positions that hold a visual code (masked row ends drop out)."""
    return masked_positions & (ids >= vocabulary.visual_start)
