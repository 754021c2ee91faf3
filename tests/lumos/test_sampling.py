import math

import numpy as np
import pytest
import torch

from lumos.compression import VideoSize
from lumos.config import SamplingConfig
from lumos.guidance import GenerationRequest, GuidedBranches, history_mask_index
from lumos.layout import parse, prompt_text
from lumos.sampling import draw_tokens, generate, num_remasked

from .models import VOCABULARY, tiny_model

SHAPE = (3, 2, 4)


def request(seed=0, text=(3, 1, 4, 1, 5), given=None, **changes):
    settings = {"num_steps": 4, "guidance_scale": 3.0, "history_ratio": 0.5}
    config = SamplingConfig(**{**settings, **changes})
    return GenerationRequest(text_ids=text, shape=SHAPE, fps=12, seed=seed, config=config, given=given)


def fill_grid(grid, probabilities, temperature, generator):
    """Draw a code into every masked cell; the confidence of each cell drawn."""
    uniform = torch.rand(len(probabilities), generator=generator).double()
    noise = torch.rand(len(probabilities), generator=generator).double()
    confidence = {}
    for slot in range(len(probabilities)):
        r, c = divmod(slot, len(grid[0]))
        if grid[r][c] != VOCABULARY.mask:
            continue
        below = probabilities[slot].cumsum(0)
        code = int((below <= uniform[slot] * below[-1]).sum())
        gumbel = -math.log(max(-math.log(max(float(noise[slot]), 1e-20)), 1e-20))
        confidence[slot] = math.log(float(probabilities[slot, code])) + temperature * gumbel
        grid[r][c] = VOCABULARY.visual_start + code
    return confidence


def plain_sampler(model, req):
    """The sampler as one would write it from the paper: no cache, no batch, one whole sequence for every pass."""
    t, h, w = req.shape
    cfg, v = req.config, VOCABULARY
    generator = torch.Generator().manual_seed(req.seed)
    duration = max(1, round((4 * t - 3) / req.fps))
    video = [v.video_start, v.number_base + duration, v.number_base + round(req.fps)]
    prompts = [[v.bos, *req.text_ids, v.turn_end, *video], video]
    unit = v.grid_unit // 8

    def frame_ids(grid):
        rows = [[*row, v.row_end] for row in grid]
        size = [v.number_base + h // unit, v.number_base + w // unit]
        return [v.frame_start, *size, *(x for row in rows for x in row), v.frame_end]

    def as_history(ids):
        masked = list(ids)
        cells = h * (w + 1)
        count = max(1, round(cfg.history_ratio * cells))
        for i in range(count):
            masked[3 + min(cells - 1, round(float(np.float32(i) * np.float32(cells / count))))] = v.mask
        return masked

    def logits(context, current):
        ids = torch.tensor(context + current)
        hidden = model(ids, [parse(v, ids)])[len(context) :]
        all_logits = hidden @ model.lm_head.weight.T
        slots = [3 + r * (w + 1) + c for r in range(h) for c in range(w)]
        return all_logits[slots][:, v.visual_start :]

    video_codes, history = [], []
    for given in req.given if req.given is not None else []:
        video_codes.append(given)
        history += as_history(frame_ids((given + v.visual_start).tolist()))
    while len(video_codes) < t:
        grid = [[v.mask] * w for _ in range(h)]
        temperature = cfg.temperature
        for step in range(cfg.num_steps):
            cond, uncond = (logits(p + history, frame_ids(grid)) for p in prompts)
            guided = (uncond + cfg.guidance_scale * (cond - uncond)).double() / cfg.draw_temperature
            temperature *= 1 - (step + 1) / cfg.num_steps
            confidence = fill_grid(grid, guided.softmax(-1), temperature, generator)
            if step + 1 < cfg.num_steps:
                wanted = math.floor(h * w * math.cos(math.pi / 2 * (step + 1) / cfg.num_steps))
                count = max(1, min(len(confidence) - 1, wanted))
                for slot in sorted(confidence, key=confidence.get)[:count]:
                    grid[slot // w][slot % w] = v.mask
        video_codes.append(np.array(grid) - v.visual_start)
        history += as_history(frame_ids(grid))
    return np.stack(video_codes)


@pytest.mark.parametrize("heat", [1.0, 0.6, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_the_options_of_the_draw_equal_a_plain_sampler(seed, heat):
    model = tiny_model(seed)
    given = np.random.default_rng(seed).integers(0, VOCABULARY.codebook_size, (1, 2, 4)) if seed % 2 else None
    req = request(seed, given=given, draw_temperature=heat)
    with torch.no_grad():
        assert np.array_equal(generate(model, VOCABULARY, [req])[0], plain_sampler(model, req))


def test_invariance_of_a_request_to_its_batch_mates():
    model = tiny_model()
    texts = [(3, 1, 4), (1,), (9, 2, 6, 5, 3, 5, 8), (), (3, 1, 4)]
    scales, heats = [3.0, 1.0, 5.0, 0.0, 3.0], [1.0, 0.5, 1.0, 2.0, 0.7]
    requests = [
        request(i, text, guidance_scale=scale, draw_temperature=heat)
        for i, (text, scale, heat) in enumerate(zip(texts, scales, heats, strict=True))
    ]
    alone = [generate(model, VOCABULARY, [req])[0] for req in requests]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1]):
        together = generate(model, VOCABULARY, [requests[i] for i in order])
        for i, video in zip(order, together, strict=True):
            assert np.array_equal(video, alone[i])


def test_invariance_holds_bitwise_for_the_logits():
    model = tiny_model()
    unknown = torch.ones(1, 8, dtype=torch.bool)
    frame = GuidedBranches(model, VOCABULARY, [request()]).frame.length
    tokens = torch.full((1, frame), VOCABULARY.mask)
    with torch.inference_mode():
        alone = GuidedBranches(model, VOCABULARY, [request()])
        lone = alone.logits(alone.guided(tokens, unknown, unknown, step=0, num_steps=4))
        many = [request(1, (7, 7)), request(), request(2, (1, 2, 3, 4, 5, 6, 7, 8))]
        batch = GuidedBranches(model, VOCABULARY, many)
        together = batch.logits(
            batch.guided(tokens.expand(3, -1), unknown.expand(3, -1), unknown.expand(3, -1), step=0, num_steps=4)
        )
    assert torch.equal(together[8:16], lone)


def test_cached_equals_uncached():
    model = tiny_model()
    req = request(given=np.ones((2, 2, 4), dtype=np.int64))
    with torch.inference_mode():
        branches = GuidedBranches(model, VOCABULARY, [req])
        context, _, _ = branches.context(req, drop_text=False)
        frame = torch.full((1, branches.frame.length), VOCABULARY.mask)
        frame[0, :3] = context[-branches.frame.length :][:3]
        frame[0, -1] = VOCABULARY.frame_end
        cached, _ = branches.hidden(frame)
        whole = torch.cat([context, frame[0]])
        uncached = model(whole, [parse(VOCABULARY, whole)])[len(context) :][branches.slots]
    torch.testing.assert_close(cached[0], uncached, atol=1e-5, rtol=0)


def test_options_of_the_release_change_what_they_should():
    model = tiny_model()
    base = generate(model, VOCABULARY, [request()])[0]
    compounding = generate(model, VOCABULARY, [request(release_temperature=True)])[0]
    assert np.array_equal(base[0], compounding[0])
    assert not np.array_equal(base, compounding)
    given = np.ones((1, 2, 4), dtype=np.int64)
    visible = generate(model, VOCABULARY, [request(given=given, release_given_frames=True)])[0]
    assert not np.array_equal(visible, generate(model, VOCABULARY, [request(given=given)])[0])


@pytest.mark.parametrize("changes", [{"guidance_scale": 1.0}, {"num_steps": 1}, {"history_ratio": 0.0}])
def test_settings_that_crash_the_release_work(changes):
    video = generate(tiny_model(), VOCABULARY, [request(**changes)])[0]
    assert video.shape == SHAPE
    assert 0 <= video.min() <= video.max() < VOCABULARY.codebook_size


def test_frames_are_announced_in_order_and_given_frames_kept():
    seen = []
    given = np.full((1, 2, 4), 5)
    video = generate(
        tiny_model(), VOCABULARY, [request(given=given)], on_frame=lambda r, f, codes: seen.append((r, f, codes))
    )[0]
    assert [(r, f) for r, f, _ in seen] == [(0, 1), (0, 2)]
    assert np.array_equal(video[0], given[0])
    assert np.array_equal(np.stack([codes for _, _, codes in seen]), video[1:])


def test_a_ratio_of_zero_leaves_the_history_visible():
    assert len(history_mask_index(20, 0.0)) == 0
    assert history_mask_index(20, 1.0).tolist() == list(range(20))


@pytest.mark.parametrize("codes", [64000, 4375, 512, 6])
@pytest.mark.parametrize("scale", [0.1, 12.0])
def test_a_draw_inverts_the_distribution_function(codes, scale):
    """As running sums over all codes in float64 do, also at the ends."""
    generator = torch.Generator().manual_seed(codes)
    logits = scale * torch.randn(100, codes, generator=generator)
    uniform = torch.rand(100, generator=generator)
    uniform[:3] = torch.tensor([0.0, 1.0 - 2**-24, 1.0])
    drawn, selected = draw_tokens(logits, uniform)
    probabilities = logits.softmax(-1)
    below = probabilities.double().cumsum(-1)
    target = uniform[:, None].double() * below[:, -1:]
    # What a sum in float32 is off by may decide at a border.
    low, high = ((below <= target + grain).sum(-1).clamp_max(codes - 1) for grain in (-1e-6, 1e-6))
    assert ((low <= drawn) & (drawn <= high)).all()
    assert (low == drawn).float().mean() > 0.9
    assert torch.equal(selected, probabilities.gather(-1, drawn[:, None])[:, 0])
    alone = [draw_tokens(logits[i : i + 1], uniform[i : i + 1]) for i in range(20)]
    assert torch.equal(torch.cat([code for code, _ in alone]), drawn[:20])


def test_a_draw_never_gives_a_code_without_probability():
    """The sum of a block in float32 may be above that of its codes in float64, and a draw between the two."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 512, generator=generator)
    logits[:, -10:] = -torch.inf
    for uniform in (0.0, 1.0 - 2**-24):
        codes, selected = draw_tokens(logits, torch.full((200,), uniform))
        assert selected.min() > 0
        assert codes.max() < 502


def test_remasking_never_keeps_everything_nor_stalls():
    for steps in (2, 3, 10):
        unknown = 7
        for step in range(steps - 1):
            left = num_remasked(7, unknown, step, steps)
            assert 1 <= left <= max(1, unknown - 1)
            unknown = left


def test_requests_that_cannot_share_a_batch_are_refused():
    with pytest.raises(ValueError, match="number of steps"):
        generate(tiny_model(), VOCABULARY, [request(), request(num_steps=2)])
    with pytest.raises(ValueError, match="given frames"):
        request(given=np.zeros((3, 2, 4), dtype=np.int64))
    with pytest.raises(ValueError, match=r"0\.\.31"):
        generate(tiny_model(), VOCABULARY, [request(given=np.full((1, 2, 4), 32))])
    with pytest.raises(ValueError, match="tokens"):
        generate(tiny_model(max_seq_len=20), VOCABULARY, [request()])
    with pytest.raises(ValueError, match="another text tokenizer"):
        generate(tiny_model(), VOCABULARY, [request(text=(50,))])


def test_prompt_templates():
    size = VideoSize(width=448, height=256, num_frames=25, fps=12)
    text = prompt_text("lumos1", "a cat", size)
    assert text == (
        "Generate a video with a resolution of 448x256, consisting of 25 frames at 12 frames per second, "
        "according to the following prompt:\n a cat"
    )
    assert prompt_text("caption", "a cat", size) == "a cat"
