"""The head: one row for each token id, in two parts, since the loss of the codes gives gradients to theirs alone."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lumos.config import ModelConfig
from lumos.vocabulary import Vocabulary


class Head(nn.Module):
    """Rows of text ids, before ``config.visual_start``, and rows of visual codes, from there on.

    The text rows are a parameter only if they are to be trained. Otherwise they are a buffer: no gradient, no optimizer
    and no weight decay reaches them, and DeepSpeed, which casts parameters alone, leaves them in float32. The state
    dict holds the whole matrix as ``weight``, the key of the authors' release.
    """

    text: Tensor

    def __init__(self, config: ModelConfig, *, train_text: bool = False) -> None:
        super().__init__()
        self.num_text, self.num_visual = config.visual_start, config.vocab_size - config.visual_start
        text = torch.zeros(self.num_text, config.hidden_size)
        if train_text:
            self.text = nn.Parameter(text)
        else:
            self.register_buffer("text", text)
        self.visual = nn.Parameter(torch.zeros(self.num_visual, config.hidden_size))

    @property
    def trains_text(self) -> bool:
        """Whether the text rows are trained."""
        return not self.num_text or isinstance(self.text, nn.Parameter)

    @property
    def weight(self) -> Float[Tensor, "vocab channels"]:
        """The whole matrix without gradient, in the dtype that loses nothing of either part."""
        return torch.cat([self.text.detach(), self.visual.detach()])

    def visual_rows(self, vocabulary: Vocabulary) -> Float[Tensor, "codes channels"]:
        """The rows of the codebook, differentiable.

        Raises:
            ValueError: if some of them are among the text rows.
        """
        start = vocabulary.visual_start - self.num_text
        if start < 0:
            raise ValueError(f"the head has {self.num_text} text rows, the vocabulary {vocabulary.visual_start}")
        whole = start == 0 and vocabulary.codebook_size == self.num_visual
        return self.visual if whole else self.visual[start : start + vocabulary.codebook_size]

    def text_rows(self, vocabulary: Vocabulary) -> Float[Tensor, "texts channels"]:
        """The rows before those of the codebook, differentiable where they are trained."""
        return self.text if self.num_text else self.visual[: vocabulary.visual_start]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if len(self.visual) == self.num_visual:
            destination[prefix + "weight"] = self.weight
        else:  # under ZeRO-3 each worker holds another part of the parameters
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        whole = state_dict.pop(prefix + "weight", None)
        if whole is not None:
            state_dict[prefix + "text"], state_dict[prefix + "visual"] = whole[: self.num_text], whole[self.num_text :]
        super()._load_from_state_dict(state_dict, prefix, *args)


def join_weights(weights: Mapping[str, Tensor], head: Head) -> dict[str, Tensor]:
    """Weights named as a decoder's parameters are, with the head under the authors' key, in the dtype of its codes.

    The text rows are those of ``head`` unless they are among the weights. Authors' keys stay as they are.
    """
    joined = dict(weights)
    if "lm_head.visual" in joined:
        visual, text = joined.pop("lm_head.visual"), joined.pop("lm_head.text", head.text)
        joined["lm_head.weight"] = torch.cat([text.detach().to(visual), visual.detach()])
    return joined
