"""Drawing videos: per-frame masked decoding with guidance, a KV cache and a partially masked history.

Every latent frame starts as mask tokens; in each of ``num_steps`` passes all unknown cells are drawn, and the least
confident ones are masked again, along a cosine schedule. A finished frame enters the cache with part of its cells
masked (paper, AR-DF inference). A request's tokens depend on its own prompt, seed and settings only.

Ways to do with less, which change what is drawn, are in ``SamplingConfig.shortcuts``.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lumos.config import ShortcutConfig
from lumos.decoder import Decoder
from lumos.guidance import GenerationRequest, GuidedBranches
from lumos.vocabulary import Vocabulary

# Rows of probabilities that are held at a time: on a CPU few enough to stay in its cache.
_DRAW_CHUNK = {"cpu": 16, "cuda": 2048}
_DRAW_BLOCK = 256  # codes whose probabilities are summed before one of them is looked for
_HEAD_ROWS = 512  # rows whose logits are held at a time; more gain nothing

FrameCallback = Callable[[int, int, np.ndarray], None]


def num_remasked(num_slots: int, num_unknown: int, step: int, num_steps: int) -> int:
    """How many cells are masked again after a step: a cosine in float32, at least 1, at most all unknown but one."""
    progress = torch.tensor((step + 1) / num_steps, dtype=torch.float32)
    scheduled = int((num_slots * torch.cos(progress * math.pi / 2)).floor())
    return max(1, min(num_unknown - 1, scheduled))


def remask(
    probabilities: Float[Tensor, " unknown"], gumbel: Float[Tensor, " unknown"], temperature: float, count: int
) -> Bool[Tensor, " unknown"]:
    """Which of the slots drawn in this step are masked again: those strictly less confident than the count-th.

    Confidence is the log of a drawn token's probability, after guidance, plus noise scaled by the temperature.
    """
    confidence = probabilities.clamp_min(1e-20).log() + temperature * gumbel
    return confidence < confidence.sort().values[min(count, len(confidence) - 1)]


@lru_cache(maxsize=32)
def halton_order(rows: int, cols: int) -> Int64[Tensor, " slots"]:
    """All slots of a frame in an order that is spread evenly over it from the first on (Halton, bases 2 and 3)."""
    order: dict[int, None] = {}
    number = 1
    while len(order) < rows * cols:
        across, down = _radical_inverse(number, 2), _radical_inverse(number, 3)
        order[int(down * rows) * cols + int(across * cols)] = None
        number += 1
    return torch.tensor(list(order))


def _radical_inverse(number: int, base: int) -> float:
    """The digits of a number behind the point, mirrored: in [0, 1)."""
    inverse, scale = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        scale /= base
        inverse += digit * scale
    return inverse


def draw_tokens(
    logits: Float[Tensor, "slots codes"], uniform: Float[Tensor, " slots"]
) -> tuple[Int64[Tensor, " slots"], Float[Tensor, " slots"]]:
    """One code per slot, by inverting its distribution function at a uniform draw, and the probability of that code.

    The block of codes is found first, by running sums of the blocks' probabilities, then the code within it. Running
    sums are in float64, as over 64,000 codes those in float32 would be off by more than the draw's grain; the sum of a
    block is in float32, off by a part in 10 million of the block's.
    """
    codes, selected = [], []
    rows = _DRAW_CHUNK.get(logits.device.type, 2048)
    block = math.gcd(logits.shape[1], _DRAW_BLOCK)
    for start in range(0, len(logits), rows):
        probabilities = logits[start : start + rows].softmax(-1)
        blocks = probabilities.unflatten(-1, (-1, block))
        sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
        target = uniform[start : start + rows, None].double() * sums[:, -1:]
        number = torch.searchsorted(sums, target, right=True).clamp_max(sums.shape[1] - 1)
        target = target - F.pad(sums, (1, 0)).gather(-1, number)
        within = blocks.gather(1, number[..., None].expand(-1, -1, block)).squeeze(1).cumsum(-1, dtype=torch.float64)
        # Below its own sum, of which that in float32 may be above: beyond it the codes have no probability.
        target = target.minimum(within[:, -1:].nextafter(within.new_zeros(())))
        code = block * number + torch.searchsorted(within, target, right=True).clamp_max(block - 1)
        codes.append(code.squeeze(-1))
        selected.append(probabilities.gather(-1, code).squeeze(-1))
    return torch.cat(codes), torch.cat(selected)


@torch.inference_mode()
def generate(
    model: Decoder,
    vocabulary: Vocabulary,
    requests: Sequence[GenerationRequest],
    *,
    on_frame: FrameCallback | None = None,
    on_step: Callable[[], object] | None = None,
) -> list[np.ndarray]:
    """Draw the videos of a batch of requests.

    Args:
        model: the decoder, in eval mode; on CPU in float32 results do not depend on batch-mates.
        vocabulary: the model's token ids.
        requests: of one shape and number of given frames, with equal ``config.passes``; prompts may differ in length.
        on_frame: called with (request, latent frame, codes [h, w]) as frames are finished.
        on_step: called before every step of every frame; what it raises ends the drawing.

    Returns:
        Codes [t, h, w] (int64) of each request, given frames included.

    Raises:
        ValueError: if requests cannot share a batch, do not fit the model, or hold codes out of range.
    """
    if not requests:
        return []
    shared: dict[str, set[Any]] = {
        "shape": {request.shape for request in requests},
        "number of steps": {request.config.num_steps for request in requests},
        "number of given frames": {request.num_given for request in requests},
        "shortcuts that decide on passes": {request.config.passes for request in requests},
    }
    for what, values in shared.items():
        if len(values) > 1:
            raise ValueError(f"requests of one batch must share the {what}, got {sorted(map(str, values))}")
    branches = GuidedBranches(model, vocabulary, requests)
    draws = [_Draws(request) for request in requests]
    videos = [[] if r.given is None else list(r.given.astype(np.int64)) for r in requests]
    first, (num_latents, rows, cols) = requests[0].num_given, requests[0].shape
    for index in range(first, num_latents):
        codes = _draw_frame(branches, draws, requests[0].config.steps_of(index - first), on_step)
        for request, video in enumerate(videos):
            video.append(codes[request].reshape(rows, cols).numpy())
            if on_frame:
                on_frame(request, index, video[-1])
        if index + 1 < num_latents:
            branches.commit(branches.frames(codes, torch.zeros_like(codes, dtype=torch.bool)))
    return [np.stack(video) for video in videos]


class _Draws:
    """The random stream and the re-masking temperature of one request, and which slots a step draws and keeps."""

    def __init__(self, request: GenerationRequest) -> None:
        self.config, self.shortcuts = request.config, request.config.shortcuts or ShortcutConfig()
        self.grid = request.shape[1:]
        self.generator = torch.Generator().manual_seed(request.seed)
        self.temperature = self.config.temperature

    def begin_frame(self) -> None:
        """Restore the temperature; the release lets it run down over the first frame and stay at 0."""
        if not self.config.release_temperature:
            self.temperature = self.config.temperature

    def uniform(self) -> Tensor:
        """One uniform draw per slot of the frame."""
        return torch.rand(math.prod(self.grid), generator=self.generator)

    def drawn(self, unknown: Bool[Tensor, " slots"], step: int, num_steps: int) -> Bool[Tensor, " slots"]:
        """The slots that a step draws: all that are unknown, or the next in order, which it keeps."""
        count = int(unknown.sum())
        if self.shortcuts.order == "confidence" or step + 1 == num_steps or not count:
            return unknown
        order = halton_order(*self.grid)
        left = order[unknown[order]]
        drawn = torch.zeros_like(unknown)
        drawn[left[: count - num_remasked(len(unknown), count, step, num_steps)]] = True
        return drawn

    def masked_again(
        self, probabilities: Float[Tensor, " drawn"], drawn: Bool[Tensor, " slots"], step: int, num_steps: int
    ) -> Bool[Tensor, " drawn"]:
        """Which of the slots drawn in this step are masked again."""
        self.temperature *= 1 - (step + 1) / num_steps
        gumbel = -(-self.uniform().clamp_min(1e-20).log()).clamp_min(1e-20).log()[drawn]
        if step + 1 == num_steps or not len(probabilities) or self.shortcuts.order == "halton":
            return torch.zeros(len(probabilities), dtype=torch.bool)
        count = num_remasked(len(drawn), len(probabilities), step, num_steps)
        masked = remask(probabilities, gumbel, self.temperature, count)
        if self.shortcuts.threshold is not None:
            masked &= probabilities < self.shortcuts.threshold
        return masked


def _draw_frame(
    branches: GuidedBranches, draws: Sequence[_Draws], num_steps: int, on_step: Callable[[], object] | None
) -> Int64[Tensor, "requests slots"]:
    """Draw one latent frame of every request by masked decoding."""
    codes = torch.zeros(len(draws), len(branches.slots), dtype=torch.int64)
    unknown = torch.ones_like(codes, dtype=torch.bool)
    heat = torch.tensor([stream.config.draw_temperature for stream in draws])
    for stream in draws:
        stream.begin_frame()
    for step in range(num_steps):
        if on_step:
            on_step()
        drawn = torch.stack(
            [stream.drawn(slots, step, num_steps) for stream, slots in zip(draws, unknown, strict=True)]
        )
        # Streams advance in every step, also where nothing is left to draw in the last ones.
        uniform = torch.cat([stream.uniform()[slots] for stream, slots in zip(draws, drawn, strict=True)])
        probabilities = uniform
        if len(uniform):
            frames = branches.frames(codes, unknown)
            hidden = branches.guided(frames, unknown, drawn, step=step, num_steps=num_steps)
            hidden /= heat.repeat_interleave(drawn.sum(-1)).unsqueeze(-1).to(hidden.device)
            codes[drawn], probabilities = _draw(branches, hidden, uniform)
        unknown &= ~drawn
        for request, selected in enumerate(torch.split(probabilities, drawn.sum(-1).tolist())):
            slots = drawn[request]
            unknown[request, slots] = draws[request].masked_again(selected, slots, step, num_steps)
    return codes


def _draw(branches: GuidedBranches, hidden: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A code for each hidden state and its probability, on the CPU; logits of a bounded number at a time."""
    uniform = uniform.to(hidden.device)
    found = [
        draw_tokens(branches.logits(hidden[start : start + _HEAD_ROWS]), uniform[start : start + _HEAD_ROWS])
        for start in range(0, len(hidden), _HEAD_ROWS)
    ]
    codes, probabilities = zip(*found, strict=True)
    return torch.cat(codes).cpu(), torch.cat(probabilities).cpu()
