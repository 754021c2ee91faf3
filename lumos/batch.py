"""Documents packed one after another for one forward pass, with where their loss is taken."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lumos.layout import SequenceLayout
from lumos.masking import loss_mask
from lumos.vocabulary import Vocabulary


@dataclass(frozen=True)
class PackedBatch:
    """Documents of one forward pass, one after another; :func:`pack` makes one from whole training samples.

    Where ``loss_positions`` are given, and so need not be found on the device, a pass waits for no device.
    """

    ids: Int64[Tensor, " tokens"]  # unmasked
    masked_positions: Bool[Tensor, " tokens"]
    layouts: tuple[SequenceLayout, ...]
    loss_positions: Int64[Tensor, " masked"] | None = None  # of the masked visual tokens; None: to be found
    loss_frames: Int64[Tensor, " masked"] | None = None  # the 0-based frame of each in its document; None likewise

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on a device."""
        names = ("ids", "masked_positions", "loss_positions", "loss_frames")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items() if x is not None})

    def with_loss_positions(self, vocabulary: Vocabulary) -> "PackedBatch":
        """The batch with what the loss needs to know of its tokens; itself where that is known."""
        if self.loss_positions is not None and self.loss_frames is not None:
            return self
        positions = loss_mask(self.ids, self.masked_positions, vocabulary).nonzero().squeeze(-1)
        frames = torch.cat([layout.frame_index for layout in self.layouts]).to(positions.device)
        return replace(self, loss_positions=positions, loss_frames=frames[positions])


def pack(
    ids: Int64[Tensor, " tokens"],
    masked_positions: Bool[Tensor, " tokens"],
    layouts: tuple[SequenceLayout, ...],
    vocabulary: Vocabulary,
) -> PackedBatch:
    """A batch of training samples that lie one after another, without what changes no loss.

    What follows a sample's last frame is cut off: nothing before attends to it, and no loss is taken there.
    """
    kept, cut, start = [], [], 0
    for layout in layouts:
        cut.append(layout.without_tail)
        kept.append(torch.arange(start, start + cut[-1].length))
        start += layout.length
    index = torch.cat(kept)
    return PackedBatch(ids[index], masked_positions[index], tuple(cut)).with_loss_positions(vocabulary)
