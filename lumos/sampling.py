"""Drawing videos: per-frame masked decoding with guidance, a KV cache and a partially masked history.

Every latent frame starts as mask tokens; in each of ``num_steps`` passes all unknown cells are drawn, and the least
confident ones are masked again, along a cosine schedule. A finished frame enters the cache with part of its cells
masked (paper, AR-DF inference). A request's tokens depend on its own prompt, seed and settings only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lumos.config import SamplingConfig
from lumos.decoder import Decoder
from lumos.layout import FRAME_HEADER, SequenceLayout, frame_tokens, header_tokens, video_layout
from lumos.rope import position_ids
from lumos.vocabulary import Vocabulary

_DRAW_CHUNK = 2048  # rows of probabilities whose float64 running sums are held at a time
_ROW_MULTIPLE = 8  # as in the decoder: products over whole groups of 8 rows do not depend on batch-mates

FrameCallback = Callable[[int, int, np.ndarray], None]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One video to draw.

    Raises:
        ValueError: if the shape or the given frames do not make sense.
    """

    text_ids: Sequence[int]  # the encoded prompt, without BOS
    shape: tuple[int, int, int]  # latent (t, h, w), given frames included
    fps: float
    seed: int
    config: SamplingConfig = field(default_factory=SamplingConfig)
    given: np.ndarray | None = None  # codes [g, h, w] of frames to continue from, 0 < g < t

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"a video needs at least one cell in (t, h, w), got {self.shape}")
        if self.given is not None and (
            self.given.ndim != 3
            or not 0 < len(self.given) < self.shape[0]
            or self.given.shape[1:] != tuple(self.shape[1:])
        ):
            raise ValueError(f"given frames of shape {list(self.given.shape)} do not begin a video of {self.shape}")

    @property
    def num_given(self) -> int:
        """Latent frames given."""
        return 0 if self.given is None else len(self.given)


def history_mask_index(num_cells: int, ratio: float) -> Int64[Tensor, " masked"]:
    """Grid cells of a finished frame that are masked in the history: evenly spaced, the same in every frame.

    The release's pattern, except that a ratio of 0 masks nothing (there, one cell).
    """
    if ratio == 0:
        return torch.zeros(0, dtype=torch.int64)
    count = max(1, round(ratio * num_cells))
    spaced = torch.arange(count, dtype=torch.float32) * (num_cells / count)
    index: Tensor = torch.unique(spaced.round().long().clamp(0, num_cells - 1))
    return index


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


def draw_tokens(
    logits: Float[Tensor, "slots codes"], uniform: Float[Tensor, " slots"]
) -> tuple[Int64[Tensor, " slots"], Float[Tensor, " slots"]]:
    """One code per slot, by inverting its distribution function at a uniform draw, and the probability of that code."""
    codes, selected = [], []
    for start in range(0, len(logits), _DRAW_CHUNK):
        probabilities = logits[start : start + _DRAW_CHUNK].softmax(-1)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        targets = uniform[start : start + _DRAW_CHUNK, None].double() * cumulative[:, -1:]
        code = torch.searchsorted(cumulative, targets, right=True).clamp_max(probabilities.shape[1] - 1)
        codes.append(code.squeeze(-1))
        selected.append(probabilities.gather(-1, code).squeeze(-1))
    return torch.cat(codes), torch.cat(selected)


class GuidedBranches:
    """The cached contexts of a batch of requests: a conditional row each, and an unconditional one where guided.

    The unconditional row is the prompt from the video start on, with positions of its own.
    """

    def __init__(self, model: Decoder, vocabulary: Vocabulary, requests: Sequence[GenerationRequest]) -> None:
        self.model, self.vocabulary, self.requests = model, vocabulary, list(requests)
        self.frame = video_layout(0, (1, *requests[0].shape[1:]))
        self.slots = self.frame.visual_index[0]
        self.device = model.lm_head.visual.device
        self.head = model.lm_head.visual_rows(vocabulary).float()
        guided = [i for i, request in enumerate(requests) if request.config.guidance_scale != 1.0]
        self.rows = [*range(len(requests)), *guided]  # the request of each row of the cache
        unconditional = {i: len(requests) + row for row, i in enumerate(guided)}
        self.unconditional = torch.tensor([unconditional.get(i, i) for i in range(len(requests))], device=self.device)
        self._prefill()

    def _prefill(self) -> None:
        contexts = [
            self.context(self.requests[i], drop_text=row >= len(self.requests)) for row, i in enumerate(self.rows)
        ]
        whole = [video_layout(header, self.requests[0].shape) for _, header, _ in contexts]
        longest = max(layout.length for layout in whole)
        if longest > self.model.config.max_seq_len:
            raise ValueError(
                f"prompt and video make {longest} tokens, the model takes {self.model.config.max_seq_len}: "
                "shorten the prompt or ask for fewer frames or a smaller size"
            )
        self.positions = [position_ids(layout, self.model.config).to(self.device) for layout in whole]
        self.cache = self.model.new_cache(len(self.rows), longest)
        self._forward(torch.cat([ids for ids, _, _ in contexts]), [layout for _, _, layout in contexts])

    def context(self, request: GenerationRequest, *, drop_text: bool) -> tuple[Tensor, int, SequenceLayout]:
        """Tokens before the first frame to draw, length of their header, and their layout."""
        header = header_tokens(
            self.vocabulary, request.text_ids, num_latents=request.shape[0], fps=request.fps, drop_text=drop_text
        )
        given: list[Tensor] = []
        if request.given is not None:
            given = [frame_tokens(self.vocabulary, cells) for cells in self.vocabulary.visual(request.given)]
        if not request.config.release_given_frames:
            given = [self.history(frame, request) for frame in given]
        layout = video_layout(len(header), (len(given), *request.shape[1:]))
        return torch.cat([header, *given]), len(header), layout

    def _forward(self, ids: Tensor, layouts: Sequence[SequenceLayout]) -> Tensor:
        positions = [
            table[past : past + layout.length]
            for table, past, layout in zip(self.positions, self.cache.lengths, layouts, strict=True)
        ]
        return self.model.forward_cached(ids.to(self.device), layouts, torch.cat(positions), self.cache)

    def _forward_frames(self, frames: Int64[Tensor, "requests length"]) -> Tensor:
        hidden = self._forward(frames[self.rows].flatten(), [self.frame] * len(self.rows))
        return hidden.reshape(len(self.rows), self.frame.length, -1)

    def frames(
        self, codes: Int64[Tensor, "requests slots"], unknown: Bool[Tensor, "requests slots"]
    ) -> Int64[Tensor, "requests length"]:
        """Frame tokens of codes, with mask tokens in the unknown slots."""
        cells = (codes + self.vocabulary.visual_start).masked_fill(unknown, self.vocabulary.mask)
        grids = cells.reshape(-1, *self.requests[0].shape[1:]).numpy()
        return torch.stack([frame_tokens(self.vocabulary, grid) for grid in grids])

    def hidden(
        self, frames: Int64[Tensor, "requests length"]
    ) -> tuple[Float[Tensor, "requests slots channels"], Float[Tensor, "requests slots channels"]]:
        """Conditional and unconditional hidden states (float32) at the visual slots; the cache is left as it was.

        Where a request has no guidance, the second is the first.
        """
        lengths = self.cache.lengths
        hidden = self._forward_frames(frames)[:, self.slots.to(self.device)].float()
        self.cache.truncate(lengths)
        return hidden[: len(self.requests)], hidden[self.unconditional]

    def guided_logits(
        self, frames: Int64[Tensor, "requests length"], unknown: Bool[Tensor, "requests slots"]
    ) -> Float[Tensor, "unknown codes"]:
        """Guided logits over the codebook at the unknown slots of all requests, request by request.

        Guidance is applied to the hidden states: the head is linear, so one product does for both branches.
        """
        conditional, unconditional = self.hidden(frames)
        scales = torch.tensor([r.config.guidance_scale for r in self.requests], device=self.device)[:, None, None]
        guided = unconditional + scales * (conditional - unconditional)
        selected = guided[unknown.to(self.device)]
        padding = -len(selected) % _ROW_MULTIPLE
        return F.linear(F.pad(selected, (0, 0, 0, padding)), self.head)[: len(selected)]

    def history(self, frame: Int64[Tensor, " length"], request: GenerationRequest) -> Int64[Tensor, " length"]:
        """A finished frame as later frames see it: part of its grid masked, row ends included."""
        hidden_cells = history_mask_index(self.frame.frames[0].grid_size, request.config.history_ratio)
        frame = frame.clone()
        frame[FRAME_HEADER + hidden_cells] = self.vocabulary.mask
        return frame

    def commit(self, frames: Int64[Tensor, "requests length"]) -> Int64[Tensor, "requests length"]:
        """Add finished frames to every context, masked as history; returns what was added."""
        masked = torch.stack([self.history(f, r) for f, r in zip(frames, self.requests, strict=True)])
        self._forward_frames(masked)
        return masked


@torch.inference_mode()
def generate(
    model: Decoder,
    vocabulary: Vocabulary,
    requests: Sequence[GenerationRequest],
    *,
    on_frame: FrameCallback | None = None,
) -> list[np.ndarray]:
    """Draw the videos of a batch of requests.

    Args:
        model: the decoder, in eval mode; on CPU in float32 results do not depend on batch-mates.
        vocabulary: the model's token ids.
        requests: of one shape, number of steps and number of given frames; prompts may differ in length.
        on_frame: called with (request, latent frame, codes [h, w]) as frames are finished.

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
    }
    for what, values in shared.items():
        if len(values) > 1:
            raise ValueError(f"requests of one batch must share the {what}, got {sorted(values)}")
    branches = GuidedBranches(model, vocabulary, requests)
    draws = [_Draws(request, len(branches.slots)) for request in requests]
    videos = [[] if r.given is None else list(r.given.astype(np.int64)) for r in requests]
    num_latents, rows, cols = requests[0].shape
    for index in range(requests[0].num_given, num_latents):
        codes = _draw_frame(branches, draws)
        for request, video in enumerate(videos):
            video.append(codes[request].reshape(rows, cols).numpy())
            if on_frame:
                on_frame(request, index, video[-1])
        if index + 1 < num_latents:
            branches.commit(branches.frames(codes, torch.zeros_like(codes, dtype=torch.bool)))
    return [np.stack(video) for video in videos]


class _Draws:
    """The random stream and the re-masking temperature of one request."""

    def __init__(self, request: GenerationRequest, num_slots: int) -> None:
        self.config = request.config
        self.num_slots = num_slots
        self.generator = torch.Generator().manual_seed(request.seed)
        self.temperature = self.config.temperature

    def begin_frame(self) -> None:
        """Restore the temperature; the release lets it run down over the first frame and stay at 0."""
        if not self.config.release_temperature:
            self.temperature = self.config.temperature

    def uniform(self) -> Tensor:
        """One uniform draw per slot of the frame."""
        return torch.rand(self.num_slots, generator=self.generator)

    def remask(self, probabilities: Tensor, unknown: Tensor, step: int) -> Tensor:
        """Which of the slots drawn in this step are masked again."""
        steps = self.config.num_steps
        self.temperature *= 1 - (step + 1) / steps
        gumbel = -(-self.uniform().clamp_min(1e-20).log()).clamp_min(1e-20).log()[unknown]
        if step + 1 == steps or not len(probabilities):
            return torch.zeros(len(probabilities), dtype=torch.bool)
        count = num_remasked(self.num_slots, len(probabilities), step, steps)
        return remask(probabilities, gumbel, self.temperature, count)


def _draw_frame(branches: GuidedBranches, draws: Sequence[_Draws]) -> Int64[Tensor, "requests slots"]:
    """Draw one latent frame of every request by masked decoding."""
    codes = torch.zeros(len(draws), len(branches.slots), dtype=torch.int64)
    unknown = torch.ones_like(codes, dtype=torch.bool)
    for stream in draws:
        stream.begin_frame()
    for step in range(draws[0].config.num_steps):
        # Streams advance in every step, also where more steps than cells leave nothing to draw in the last ones.
        uniform = torch.cat([stream.uniform()[slots] for stream, slots in zip(draws, unknown, strict=True)])
        probabilities = uniform
        if len(uniform):
            logits = branches.guided_logits(branches.frames(codes, unknown), unknown)
            drawn, probabilities = (x.cpu() for x in draw_tokens(logits, uniform.to(logits.device)))
            codes[unknown] = drawn
        counts = unknown.sum(-1).tolist()
        for request, selected in enumerate(torch.split(probabilities, counts)):
            slots = unknown[request].clone()
            unknown[request, slots] = draws[request].remask(selected, slots, step)
    return codes
