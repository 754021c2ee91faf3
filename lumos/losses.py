"""Masked visual cross entropy, its split by latent frame, z-loss and text loss; the module that training calls.

Only the head's rows of the codebook and only the masked positions are ever multiplied, in blocks: full logits exist
nowhere, in neither pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lumos.batch import PackedBatch
from lumos.cross_entropy import CrossEntropy, cross_entropy
from lumos.decoder import Decoder
from lumos.head import Head
from lumos.layout import SequenceLayout
from lumos.masking import apply_mask
from lumos.vocabulary import Vocabulary


@dataclass(frozen=True)
class VisualLoss:
    """Results over the masked visual tokens of a packed batch, in sequence order."""

    total: Float[Tensor, ""]  # of all tokens, z-loss included; differentiable, once. Divide by the global count
    token_losses: Float[Tensor, " masked"]  # values, float32
    normalisers: Float[Tensor, " masked"]  # log-sum-exp of the visual logits
    frame_index: Int64[Tensor, " masked"]  # 0-based latent frame of each token in its document

    def per_frame(self, num_frames: int) -> tuple[Float[Tensor, " frames"], Float[Tensor, " frames"]]:
        """Sum of losses and number of tokens of each latent frame."""
        sums = self.token_losses.new_zeros(num_frames)
        counts = torch.zeros_like(sums)
        sums.index_add_(0, self.frame_index, self.token_losses)
        counts.index_add_(0, self.frame_index, torch.ones_like(self.token_losses))
        return sums, counts


def masked_visual_loss(
    hidden: Float[Tensor, "tokens channels"],
    head: Head,
    batch: PackedBatch,
    vocabulary: Vocabulary,
    *,
    z_loss_weight: float = 0.0,
) -> VisualLoss:
    """Cross entropy over the codebook at masked visual positions; position i predicts its own token (no shift).

    ``hidden`` is of the masked sequence. Of the head only the visual rows are used. ``z_loss_weight`` times the squared
    normaliser of each token is added to the total.

    Raises:
        ValueError: if no visual token is masked.
    """
    batch = batch.with_loss_positions(vocabulary)
    selected, frames = batch.loss_positions, batch.loss_frames
    if selected is None or frames is None or not len(selected):
        raise ValueError("no visual token is masked in this batch, so there is no loss to take")
    targets = batch.ids[selected] - vocabulary.visual_start
    result = cross_entropy(hidden[selected], head.visual_rows(vocabulary), targets, z_loss_weight=z_loss_weight)
    return VisualLoss(result.total, result.losses, result.normalisers, frames)


def text_loss(
    hidden: Float[Tensor, "tokens channels"],
    head: Head,
    ids: Int64[Tensor, " tokens"],
    layouts: Sequence[SequenceLayout],
    vocabulary: Vocabulary,
) -> CrossEntropy | None:
    """Next-token cross entropy of the prompt, up to and including its turn end; rows before the visual ones only.

    Documents without a prompt (a dropped caption) contribute nothing; None where no document has one.
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
        return None
    index = torch.cat(positions)
    return cross_entropy(hidden[index], head.text_rows(vocabulary), ids[index + 1])


class LossModule(nn.Module):
    """The decoder with its loss, in one module so that ZeRO-3 gathers the head's weight for it.

    Precision is of one kind everywhere. In float32 all is float32. In bfloat16 the activations and the operands of
    products are bfloat16, while sums are float32: accumulation inside products, statistics of norms, softmax and
    log-sum-exp of the logits that the forward product gave, losses, and gradients summed over blocks of rows or of
    keys; so are the masters that an optimizer updates. Two forms compute that: ``autocast`` over float32 parameters,
    which then are the masters (as on a CPU), or parameters that are bfloat16 copies of masters kept elsewhere (as
    DeepSpeed keeps them on a GPU), without autocast.

    Args:
        decoder: the model.
        vocabulary: its token ids.
        z_loss_weight: of the squared log-sum-exp of the visual logits, for each masked visual token.
        text_loss_weight: of the next-token loss of each prompt token, against 1 of a masked visual token. Above 0 it
            needs a decoder made with ``train_text``.
        autocast: dtype of products over float32 parameters; None: that of the parameters.

    Raises:
        ValueError: if the text is to be trained and its rows of the head are not.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        z_loss_weight: float = 0.0,
        *,
        text_loss_weight: float = 0.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if text_loss_weight and not decoder.lm_head.trains_text:
            raise ValueError(f"text_loss_weight is {text_loss_weight:g}, but the decoder was made without train_text")
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.z_loss_weight = z_loss_weight
        self.text_loss_weight = text_loss_weight
        self.autocast = autocast

    def forward(
        self, batch: PackedBatch, num_frames: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " frames"], Float[Tensor, " frames"]]:
        """Sum of token losses with z-loss and text loss (differentiable); sum and number by latent frame.

        The last two are of the masked visual tokens' cross entropy alone.
        """
        device = batch.ids.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            hidden = self.decoder(apply_mask(batch.ids, batch.masked_positions, self.vocabulary), batch.layouts)
            loss = masked_visual_loss(
                hidden, self.decoder.lm_head, batch, self.vocabulary, z_loss_weight=self.z_loss_weight
            )
            total = loss.total
            if self.text_loss_weight:
                text = text_loss(hidden, self.decoder.lm_head, batch.ids, batch.layouts, self.vocabulary)
                if text is None:  # the rows have a gradient on every worker or on none: workers reduce them together
                    total = total + self.decoder.lm_head.text_rows(self.vocabulary)[:0].sum()
                else:
                    total = total + self.text_loss_weight * text.total
        return total, *loss.per_frame(num_frames)
