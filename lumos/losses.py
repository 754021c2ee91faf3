"""Masked visual cross entropy, its split by latent frame, z-loss and text loss.

Only the head's rows of the codebook and only the masked positions are ever multiplied, in chunks: full logits exist
nowhere, in neither pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lumos.decoder import Decoder
from lumos.layout import SequenceLayout
from lumos.masking import apply_mask, loss_mask
from lumos.vocabulary import Vocabulary

CHUNK_ROWS = 1024  # rows of logits held at a time: 64,000 columns of float32 are 262 MB


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy and log-normaliser of each row, both differentiable; logits are recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(losses)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight).float()
            normalisers[rows] = logits.logsumexp(-1)
            losses[rows] = normalisers[rows] - logits.gather(-1, targets[rows, None]).squeeze(-1)
        ctx.save_for_backward(hidden, weight, targets, normalisers)
        ctx.chunk_rows = chunk_rows  # type: ignore[attr-defined]
        return losses, normalisers

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_losses: Tensor, grad_normalisers: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, normalisers = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(hidden), ctx.chunk_rows):  # type: ignore[attr-defined]
            rows = slice(start, start + ctx.chunk_rows)  # type: ignore[attr-defined]
            logits = F.linear(hidden[rows], weight).float()
            grad = (logits - normalisers[rows, None]).exp_()
            grad *= (grad_losses[rows] + grad_normalisers[rows])[:, None]
            grad.scatter_add_(-1, targets[rows, None], -grad_losses[rows, None])
            grad = grad.to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def cross_entropy_rows(
    hidden: Float[Tensor, "rows channels"],
    weight: Float[Tensor, "classes channels"],
    targets: Int64[Tensor, " rows"],
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Cross entropy of every row and the log of its softmax normaliser, float32, differentiable.

    Targets are 0..classes-1. At most ``chunk_rows`` rows of logits exist at a time.
    """
    losses, normalisers = _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_rows)
    return losses, normalisers


@dataclass(frozen=True)
class VisualLoss:
    """Per-token results over the masked visual tokens of a packed batch, in sequence order."""

    token_losses: Float[Tensor, " masked"]  # float32, differentiable
    normalisers: Float[Tensor, " masked"]  # log-sum-exp of the visual logits, for z-loss
    frame_index: Int64[Tensor, " masked"]  # 0-based latent frame of each token in its document

    @property
    def count(self) -> int:
        """Number of masked visual tokens."""
        return len(self.token_losses)

    def total(self, z_loss_weight: float = 0.0) -> Float[Tensor, ""]:
        """Sum over tokens, with ``z_loss_weight`` times the squared normaliser added. Divide by the global count."""
        total = self.token_losses.sum()
        return total + z_loss_weight * self.normalisers.square().sum() if z_loss_weight else total

    def per_frame(self, num_frames: int) -> tuple[Float[Tensor, " frames"], Float[Tensor, " frames"]]:
        """Sum of losses and number of tokens of each latent frame, detached."""
        sums = torch.zeros(num_frames, device=self.token_losses.device)
        sums.index_add_(0, self.frame_index, self.token_losses.detach())
        counts = torch.bincount(self.frame_index, minlength=num_frames)
        return sums, counts.to(sums.dtype)


def masked_visual_loss(
    hidden: Float[Tensor, "tokens channels"],
    head_weight: Float[Tensor, "vocab channels"],
    ids: Int64[Tensor, " tokens"],
    masked_positions: Bool[Tensor, " tokens"],
    layouts: Sequence[SequenceLayout],
    vocabulary: Vocabulary,
) -> VisualLoss:
    """Cross entropy over the codebook at masked visual positions; position i predicts its own token (no shift).

    ``hidden`` is of the masked sequence, ``ids`` are the *unmasked* tokens, and ``masked_positions`` is where the mask
    token was put. Of the head only the visual rows are used.

    Raises:
        ValueError: if no visual token is masked.
    """
    selected = loss_mask(ids, masked_positions, vocabulary).nonzero().squeeze(-1)
    if not len(selected):
        raise ValueError("no visual token is masked in this batch, so there is no loss to take")
    rows = slice(vocabulary.visual_start, vocabulary.visual_start + vocabulary.codebook_size)
    targets = ids[selected] - vocabulary.visual_start
    losses, normalisers = cross_entropy_rows(hidden[selected], head_weight[rows], targets)
    frame_index = torch.zeros_like(ids)
    start = 0
    for layout in layouts:
        for index, frame in enumerate(layout.frames):
            frame_index[start + frame.start : start + frame.stop] = index
        start += layout.length
    return VisualLoss(losses, normalisers, frame_index[selected])


def text_loss(
    hidden: Float[Tensor, "tokens channels"],
    head_weight: Float[Tensor, "vocab channels"],
    ids: Int64[Tensor, " tokens"],
    layouts: Sequence[SequenceLayout],
    vocabulary: Vocabulary,
) -> Float[Tensor, " predicted"]:
    """Next-token cross entropy of the prompt, up to and including its turn end; rows before the visual ones only.

    Documents without a prompt (a dropped caption) contribute nothing, so the result may be empty.
    """
    positions = []
    start = 0
    for layout in layouts:
        header = layout.frames[0].start if layout.frames else layout.length
        turn_ends = (ids[start : start + header] == vocabulary.turn_end).nonzero()
        if len(turn_ends):
            positions.append(torch.arange(start, start + int(turn_ends[0]), device=ids.device))
        start += layout.length
    if not positions:
        return hidden.new_zeros(0, dtype=torch.float32)
    index = torch.cat(positions)
    losses, _ = cross_entropy_rows(hidden[index], head_weight[: vocabulary.visual_start], ids[index + 1])
    return losses


@dataclass(frozen=True)
class PackedBatch:
    """Documents of one forward pass, one after another."""

    ids: Int64[Tensor, " tokens"]  # unmasked
    masked_positions: Bool[Tensor, " tokens"]
    layouts: tuple[SequenceLayout, ...]

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on a device."""
        return PackedBatch(
            self.ids.to(device, non_blocking=True), self.masked_positions.to(device, non_blocking=True), self.layouts
        )


class LossModule(nn.Module):
    """The decoder with its loss, in one module so that ZeRO-3 gathers the head's weight for it."""

    def __init__(self, decoder: Decoder, vocabulary: Vocabulary, z_loss_weight: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.z_loss_weight = z_loss_weight

    def forward(
        self, batch: PackedBatch, num_frames: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " frames"], Float[Tensor, " frames"]]:
        """Sum of token losses with z-loss (differentiable); sum and number of token losses by latent frame."""
        masked_ids = apply_mask(batch.ids, batch.masked_positions, self.vocabulary)
        hidden = self.decoder(masked_ids, batch.layouts)
        loss = masked_visual_loss(
            hidden, self.decoder.lm_head.weight, batch.ids, batch.masked_positions, batch.layouts, self.vocabulary
        )
        sums, counts = loss.per_frame(num_frames)
        return loss.total(self.z_loss_weight), sums, counts
