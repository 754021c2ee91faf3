"""The contexts of requests that are drawn together: what is cached of them, and the guided passes over a frame.

Guidance takes two contexts of a request, with its prompt and without it; both go through the model in one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lumos.attention import RowPart
from lumos.config import SamplingConfig, ShortcutConfig
from lumos.decoder import Decoder
from lumos.layout import FRAME_HEADER, SequenceLayout, frame_tokens, header_tokens, video_layout
from lumos.rope import position_ids
from lumos.vocabulary import Vocabulary

_ROW_MULTIPLE = 8  # as in the decoder: products over whole groups of 8 rows do not depend on batch-mates


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


@dataclass(frozen=True)
class _StepPlan:
    """Which passes a step makes."""

    guided: bool  # guidance is applied
    keep: bool  # the difference of the branches will be asked for again
    reuse: bool  # it is taken as it was last
    whole: bool  # every token of the frame is computed

    @classmethod
    def of(cls, config: SamplingConfig, step: int, num_steps: int) -> "_StepPlan":
        short, share = config.shortcuts or ShortcutConfig(), step / num_steps
        low, high = short.guidance_interval
        reused_from = short.guidance_cache_from
        return cls(low <= share < high, reused_from < 1, share >= reused_from, step % short.context_refresh == 0)


def count_passes(config: SamplingConfig, num_latents: int) -> int:
    """Contexts of a request that go through the model for so many drawn frames: a second in each guided step.

    A pass over the unknown slots alone counts as a whole one; steps that a threshold saves are not known before.
    """
    passes = 0
    for frame in range(num_latents):
        steps = config.steps_of(frame)
        for plan in (_StepPlan.of(config, step, steps) for step in range(steps)):
            passes += 1 + (plan.guided and not plan.reuse and config.guidance_scale != 1.0)
    return passes


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
        self._second = {i: len(requests) + row for row, i in enumerate(guided)}  # row without the prompt, by request
        self._logits: Tensor | None = None  # kept from step to step: fresh memory costs more than the draw
        self._prefill()
        channels = model.config.hidden_size
        # Of every row's slots, when last computed: only what a step computed anew is used, but for the difference.
        self._hidden = torch.zeros(len(self.rows), len(self.slots), channels, device=self.device)
        self._difference = torch.zeros(len(requests), len(self.slots), channels, device=self.device)
        self._has_difference: set[int] = set()  # requests
        self._current: set[int] = set()  # rows that the last pass of this frame computed

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
        ids = torch.cat([ids for ids, _, _ in contexts])
        self._forward(ids, [RowPart(row, layout) for row, (_, _, layout) in enumerate(contexts)])

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

    def _forward(self, ids: Tensor, parts: Sequence[RowPart]) -> Tensor:
        positions = []
        for part in parts:
            past = self.cache.lengths[part.row]
            table = self.positions[part.row][past : past + part.layout.length]
            positions.append(table if part.index is None else table[part.index])
        return self.model.forward_cached(ids.to(self.device), parts, torch.cat(positions), self.cache)

    def frames(
        self, codes: Int64[Tensor, "requests slots"], unknown: Bool[Tensor, "requests slots"]
    ) -> Int64[Tensor, "requests length"]:
        """Frame tokens of codes, with mask tokens in the unknown slots."""
        cells = (codes + self.vocabulary.visual_start).masked_fill(unknown, self.vocabulary.mask)
        grids = cells.reshape(-1, *self.requests[0].shape[1:]).numpy()
        return torch.stack([frame_tokens(self.vocabulary, grid) for grid in grids])

    def guided(
        self,
        frames: Int64[Tensor, "requests length"],
        unknown: Bool[Tensor, "requests slots"],
        drawn: Bool[Tensor, "requests slots"],
        *,
        step: int,
        num_steps: int,
    ) -> Float[Tensor, "drawn channels"]:
        """Guided hidden states (float32) of the slots that are drawn, some of those unknown, request by request.

        Guidance is applied to the hidden states: the head is linear, so one product does for both branches. Which
        passes are made in this step of a frame, ``shortcuts`` say; without, one over all tokens. Requests without
        unknown slots take no part.
        """
        plan = _StepPlan.of(self.requests[0].config, step, num_steps)
        if step == 0:
            self._current, self._has_difference = set(), set()
        active = [i for i in range(len(self.requests)) if unknown[i].any()]
        guided = [i for i in active if plan.guided and i in self._second]
        # A difference that is to be reused must be there: guidance may begin later than its reuse.
        both = [i for i in guided if not (plan.reuse and i in self._has_difference)]
        self._pass(frames, [*active, *(self._second[i] for i in both)], None if plan.whole else unknown)
        found = []
        for i in active:
            slots = drawn[i].to(self.device)
            conditional = self._hidden[i, slots]
            if i in both:
                second = self._hidden[self._second[i], slots]
                found.append(second + self.requests[i].config.guidance_scale * (conditional - second))
                if plan.keep:
                    self._difference[i] = self._hidden[i] - self._hidden[self._second[i]]
            elif i in guided:
                reused = self._difference[i, slots]
                found.append(conditional + (self.requests[i].config.guidance_scale - 1.0) * reused)
            else:
                found.append(conditional)
        if plan.keep:
            self._has_difference.update(both)
        return torch.cat(found)

    def hidden(
        self, frames: Int64[Tensor, "requests length"]
    ) -> tuple[Float[Tensor, "requests slots channels"], Float[Tensor, "requests slots channels"]]:
        """Conditional and unconditional hidden states (float32) at the visual slots, by a pass over all tokens.

        Where a request has no guidance, the second is the first. The cache is left as it was.
        """
        self._pass(frames, range(len(self.rows)), None)
        second = [self._second.get(i, i) for i in range(len(self.requests))]
        return self._hidden[: len(self.requests)], self._hidden[second]

    def _pass(self, frames: Tensor, rows: Sequence[int], unknown: Tensor | None) -> None:
        """Compute hidden states of rows; with ``unknown``, of these slots alone in rows that the last pass computed."""
        lengths = list(self.cache.lengths)
        parts, ids = [], []
        for row in rows:
            index = None
            if unknown is not None and row in self._current:
                index = self.slots[unknown[self.rows[row]]]
            parts.append(RowPart(row, self.frame, None if index is None else index.to(self.device)))
            frame = frames[self.rows[row]]
            ids.append(frame if index is None else frame[index])
        hidden = self._forward(torch.cat(ids), parts).float()
        self.cache.truncate(lengths)
        slots = self.slots.to(self.device)
        for part, found in zip(parts, hidden.split([part.num_tokens for part in parts]), strict=True):
            if part.index is None:
                self._hidden[part.row] = found[slots]
            else:
                assert unknown is not None
                self._hidden[part.row, unknown[self.rows[part.row]].to(self.device)] = found
        self._current = set(rows)

    def logits(self, hidden: Float[Tensor, "slots channels"]) -> Float[Tensor, "slots codes"]:
        """Logits over the codebook; they hold until the next call."""
        padding = -len(hidden) % _ROW_MULTIPLE
        if self._logits is None or len(self._logits) < len(hidden) + padding:
            self._logits = self.head.new_empty(len(hidden) + padding, len(self.head))
        padded = F.pad(hidden, (0, 0, 0, padding))
        return torch.mm(padded, self.head.T, out=self._logits[: len(padded)])[: len(hidden)]

    def history(self, frame: Int64[Tensor, " length"], request: GenerationRequest) -> Int64[Tensor, " length"]:
        """A finished frame as later frames see it: part of its grid masked, row ends included."""
        hidden_cells = history_mask_index(self.frame.frames[0].grid_size, request.config.history_ratio)
        frame = frame.clone()
        frame[FRAME_HEADER + hidden_cells] = self.vocabulary.mask
        return frame

    def commit(self, frames: Int64[Tensor, "requests length"]) -> Int64[Tensor, "requests length"]:
        """Add finished frames to every context, masked as history; returns what was added."""
        masked = torch.stack([self.history(f, r) for f, r in zip(frames, self.requests, strict=True)])
        self._forward(masked[self.rows].flatten(), [RowPart(row, self.frame) for row in range(len(self.rows))])
        return masked
