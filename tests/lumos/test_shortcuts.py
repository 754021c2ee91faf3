"""Approximate ways to draw: off they change nothing, on they do what they say and make fewer or smaller passes."""

import numpy as np
import pytest
import torch

from lumos.config import SamplingConfig, ShortcutConfig
from lumos.guidance import GenerationRequest, GuidedBranches, count_passes
from lumos.sampling import generate, halton_order

from .models import VOCABULARY, tiny_model

SHAPE = (3, 4, 4)
STEPS = 4


def request(seed=0, text=(3, 1, 4), *, scale=3.0, steps=STEPS, **shortcuts):
    config = SamplingConfig(
        num_steps=steps, guidance_scale=scale, history_ratio=0.5, shortcuts=ShortcutConfig(**shortcuts)
    )
    return GenerationRequest(text_ids=text, shape=SHAPE, fps=12, seed=seed, config=config)


def plain(seed=0, *, scale=3.0, steps=STEPS):
    config = SamplingConfig(num_steps=steps, guidance_scale=scale, history_ratio=0.5)
    return GenerationRequest(text_ids=(3, 1, 4), shape=SHAPE, fps=12, seed=seed, config=config)


def draw(model, *requests, **options):
    return generate(model, VOCABULARY, requests, **options)


def tokens_of_passes(model, *requests):
    """Rows of each pass through the first layer, the one over the prompts first."""
    rows = []
    hook = model.model.layers[0].register_forward_hook(lambda layer, inputs, out: rows.append(len(inputs[0])))
    draw(model, *requests)
    hook.remove()
    return rows


def test_all_off_is_the_full_sampler():
    model = tiny_model()
    assert np.array_equal(draw(model, request())[0], draw(model, plain())[0])
    assert np.array_equal(draw(model, request(threshold=1.0))[0], draw(model, plain())[0])


def test_guidance_outside_of_its_interval_is_none():
    model = tiny_model()
    never = draw(model, request(guidance_interval=(0.0, 0.0)))[0]
    assert np.array_equal(never, draw(model, plain(scale=1.0))[0])
    half = draw(model, request(guidance_interval=(0.5, 1.0)))[0]
    assert not np.array_equal(half, never)
    assert not np.array_equal(half, draw(model, plain())[0])


def test_steps_of_each_frame():
    model = tiny_model()
    assert np.array_equal(draw(model, request(frame_steps=(2,)))[0], draw(model, plain(steps=2))[0])
    passes = []
    draw(model, request(frame_steps=(3, 1)), on_step=lambda: passes.append(1))
    assert len(passes) == 3 + 1 + 1


def test_a_pass_over_unknown_slots_gives_what_a_whole_one_does_while_nothing_else_changed():
    model = tiny_model()
    unknown = torch.rand(1, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.inference_mode():
        branches = GuidedBranches(model, VOCABULARY, [request(context_refresh=2)])
        codes = torch.arange(16)[None] % VOCABULARY.codebook_size
        frames = branches.frames(codes, unknown)
        whole = branches.guided(frames, unknown, unknown, step=0, num_steps=STEPS)
        part = branches.guided(frames, unknown, unknown, step=1, num_steps=STEPS)
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
        other = branches.frames((codes + 1) % VOCABULARY.codebook_size, unknown)
        stale = branches.guided(other, unknown, unknown, step=1, num_steps=STEPS)
        fresh = branches.guided(other, unknown, unknown, step=0, num_steps=STEPS)
    torch.testing.assert_close(stale, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fresh, whole, atol=1e-3)


def test_cheap_passes_compute_fewer_tokens():
    model = tiny_model()
    whole, cheap = tokens_of_passes(model, plain()), tokens_of_passes(model, request(context_refresh=2))
    assert len(whole) == len(cheap) == 1 + 3 * STEPS + 2
    assert whole[1] == cheap[1]
    assert cheap[2] < whole[2]
    assert cheap[3] == whole[3]


def test_a_reused_difference_saves_the_second_branch():
    model = tiny_model()
    with torch.inference_mode():
        branches = GuidedBranches(model, VOCABULARY, [request(guidance_cache_from=0.25)])
        unknown = torch.ones(1, 16, dtype=torch.bool)
        frames = branches.frames(torch.zeros(1, 16, dtype=torch.int64), unknown)
        both = branches.guided(frames, unknown, unknown, step=0, num_steps=STEPS)
        reused = branches.guided(frames, unknown, unknown, step=1, num_steps=STEPS)
    torch.testing.assert_close(reused, both, atol=1e-5, rtol=1e-5)
    rows = tokens_of_passes(model, request(guidance_cache_from=0.5))
    assert rows[1] == rows[2] > rows[3] == rows[4]


def test_guidance_that_begins_after_its_reuse_computes_the_difference_once():
    model = tiny_model()
    rows = tokens_of_passes(model, request(guidance_interval=(0.5, 1.0), guidance_cache_from=0.25))
    assert rows[3] > rows[1] == rows[2] == rows[4]


@pytest.mark.parametrize(
    "shortcuts",
    [
        {},
        {"scale": 1.0},
        {"frame_steps": (3, 1)},
        {"guidance_interval": (0.5, 1.0)},
        {"guidance_cache_from": 0.5},
    ],
)
def test_passes_are_counted_before_they_are_made(shortcuts):
    one, model = request(**shortcuts), tiny_model()
    single = tokens_of_passes(model, plain(scale=1.0))[1]
    commits = 2 * (1 if one.config.guidance_scale == 1.0 else 2)  # of a finished frame to each context
    assert sum(tokens_of_passes(model, one)[1:]) / single == count_passes(one.config, SHAPE[0]) + commits


def test_codes_that_pass_the_threshold_end_a_frame_early():
    model = tiny_model()
    assert len(tokens_of_passes(model, request(threshold=1e-30))) == 1 + 3 + 2
    assert len(tokens_of_passes(model, plain())) == 1 + 3 * STEPS + 2


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (16, 24), (5, 7)])
def test_halton_order_has_every_slot_once_and_is_spread_evenly(grid):
    rows, cols = grid
    order = halton_order(rows, cols)
    assert sorted(order.tolist()) == list(range(rows * cols))
    if grid == (16, 24):
        first = order[:48]
        quadrants = torch.bincount((first // cols // 8) * 2 + first % cols // 12, minlength=4)
        assert quadrants.min() >= 10


def test_halton_order_draws_every_slot_once():
    model, drawn = tiny_model(), []
    with torch.inference_mode():
        branches = GuidedBranches(model, VOCABULARY, [request(order="halton")])
    logits = type(branches).logits
    try:
        type(branches).logits = lambda self, hidden: drawn.append(len(hidden)) or logits(self, hidden)
        draw(model, request(order="halton"))
    finally:
        type(branches).logits = logits
    assert sum(drawn) == 3 * 16
    assert len(drawn) == 3 * STEPS


SHORTCUTS = [
    {"order": "halton"},
    {"threshold": 0.2},
    {"guidance_interval": (0.25, 0.75), "guidance_cache_from": 0.5},
    {"context_refresh": 3, "threshold": 0.1},
    {"order": "halton", "context_refresh": 2, "guidance_cache_from": 0.5},
]


@pytest.mark.parametrize("shortcuts", SHORTCUTS)
def test_invariance_to_batch_mates_holds_with_shortcuts(shortcuts):
    model = tiny_model()
    requests = [
        request(i, text, scale=s, **shortcuts) for i, (text, s) in enumerate([((3, 1), 3.0), ((1,), 1.0), ((), 5.0)])
    ]
    alone = [draw(model, each)[0] for each in requests]
    for video, expected in zip(draw(model, *requests), alone, strict=True):
        assert np.array_equal(video, expected)
        assert video.min() >= 0
        assert video.max() < VOCABULARY.codebook_size


def test_requests_of_different_passes_are_refused():
    with pytest.raises(ValueError, match=r"requests of one batch must share the shortcuts that decide on passes"):
        draw(tiny_model(), request(), request(context_refresh=2))


def test_drawing_ends_where_a_step_says_so():
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(tiny_model(), plain(), on_step=stop)
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0.0"),
        ({"threshold": 0.5, "order": "halton"}, r"threshold is 0.5 with order halton.*leave it out"),
        ({"guidance_interval": (0.6, 0.5)}, r"guidance_interval must be two shares .*got \[0.6, 0.5\]"),
        ({"guidance_cache_from": 0.0}, r"guidance_cache_from must be in \(0, 1\], got 0.0"),
        ({"context_refresh": 0}, r"context_refresh must be at least 1, got 0"),
        ({"frame_steps": (3, 0)}, r"frame_steps must be whole numbers of at least 1, got \[3, 0\]"),
    ],
)
def test_bad_shortcuts_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ShortcutConfig(**values)
