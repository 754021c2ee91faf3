import pytest
import torch

from lumos.config import MaskConfig
from lumos.masking import apply_mask, loss_mask, mask_ratio, num_masked, sample_masked_positions

from .models import VOCABULARY, documents


def grids(kind, seed):
    (_ids,), (layout,) = documents(4, shape=(4, 4, 4))
    masked = sample_masked_positions(layout, MaskConfig(kind=kind), torch.Generator().manual_seed(seed))
    outside = torch.ones(layout.length, dtype=torch.bool)
    outside[layout.grid_index] = False
    assert not masked[outside].any(), "text and markup are never masked"
    return masked[layout.grid_index]


def test_the_ratio_follows_a_clipped_cosine():
    assert mask_ratio(0.0, 0.7) == 1.0
    assert mask_ratio(1.0, 0.7) == 0.7
    assert mask_ratio(0.4, 0.7) == pytest.approx(0.809017, abs=1e-6)
    assert num_masked(5, 0.5) == 2  # half to even
    assert num_masked(20, 0.001) == 1


def test_a_tube_is_one_pattern_in_every_frame():
    for seed in range(20):
        grid = grids("tube", seed)
        assert (grid == grid[0]).all()
        assert 14 <= int(grid[0].sum()) <= 20  # 0.7 to 1.0 of 20 cells


def test_random_masks_differ_between_frames_at_one_ratio():
    samples = [grids("random", seed) for seed in range(20)]
    assert all(len(set(grid.sum(-1).tolist())) == 1 for grid in samples)
    assert any(not (grid == grid[0]).all() for grid in samples)


def test_diffusion_forcing_draws_a_ratio_per_frame():
    assert any(len(set(grids("diffusion_forcing", seed).sum(-1).tolist())) > 1 for seed in range(20))


def test_about_half_of_all_samples_have_the_lowest_ratio():
    counts = [int(grids("tube", seed)[0].sum()) for seed in range(400)]
    share = sum(count == 14 for count in counts) / len(counts)
    assert 0.45 < share < 0.65  # u > 0.5065, plus rounding to 14 cells


def test_a_mask_is_a_function_of_its_stream():
    assert torch.equal(grids("tube", 7), grids("tube", 7))


def test_masked_row_ends_carry_no_loss():
    (ids,), (layout,) = documents(4)
    everything = torch.zeros(layout.length, dtype=torch.bool)
    everything[layout.grid_index] = True
    masked = apply_mask(ids, everything, VOCABULARY)
    assert (masked[layout.grid_index] == VOCABULARY.mask).all()
    assert loss_mask(ids, everything, VOCABULARY).nonzero().squeeze(-1).tolist() == sorted(
        layout.visual_index.flatten().tolist()
    )
