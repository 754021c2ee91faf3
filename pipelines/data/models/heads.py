"""Small heads over CLIP features: aesthetic, NSFW, or one's own."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from pipelines.data.models.open_clip import fetched, file_hash
from pipelines.errors import UserError

_HEAD_WHERE = (
    "take one that was trained on the features of features.clip: sa_0_4_vit_l_14_linear.pth from "
    "github.com/LAION-AI/aesthetic-predictor for OpenAI's ViT-L-14, h14_nsfw.pth from github.com/LAION-AI/"
    "CLIP-based-NSFW-Detector for LAION's ViT-H-14, or your own"
)


class Head:
    """A stack of linear layers over CLIP features that gives one number.

    Takes the state dicts of LAION's predictors (.pth, .pt or .safetensors): one `nn.Linear`, or several in an
    `nn.Sequential`, if ``rectified`` with a ReLU between those whose numbers leave room for one.

    Raises:
        UserError: the file is missing or is no such stack.
    """

    def __init__(self, path: str, key: str, *, rectified: bool) -> None:
        self.hash = file_hash(path, key, where=_HEAD_WHERE)
        try:
            here = fetched(path, key, where=_HEAD_WHERE)
            if here.endswith(".safetensors"):
                state = load_file(here)
            else:
                state = torch.load(here, weights_only=True, map_location="cpu")
            self._layers = _linear_layers(state, rectified=rectified)
        except Exception as error:
            message = f"{key} {path} is no state dict of linear layers that end in one number: {error}"
            raise UserError(message) from error

    @property
    def width(self) -> int:
        """Features that it takes."""
        return int(self._layers[0][0].shape[1])

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Scores [n] of features [n, width]."""
        values = features.astype(np.float64)
        for weight, bias, rectify in self._layers:
            values = (np.maximum(values, 0) if rectify else values) @ weight.T + bias
        return values[:, 0]


def _linear_layers(
    state: Mapping[str, Any], *, rectified: bool
) -> list[tuple[NDArray[np.float64], NDArray[np.float64], bool]]:
    """Weight and bias of each layer, and whether its input is rectified."""
    numbers = {name: [int(number) for number in re.findall(r"\d+", name)] for name in state}
    names = sorted((name for name, value in state.items() if value.ndim == 2), key=numbers.__getitem__)
    used = {*names, *(name.removesuffix("weight") + "bias" for name in names)}
    if odd := sorted(state.keys() - used):
        raise ValueError(f"{odd[0]} belongs to no linear layer")
    layers = []
    last: list[int] = []
    for name in names:
        weight, bias = state[name].double().numpy(), state.get(name.removesuffix("weight") + "bias")
        gap = bool(last) and numbers[name][-1] - last[-1] > 1
        offset = bias.double().numpy() if bias is not None else np.zeros(len(weight))
        layers.append((weight, offset, rectified and gap))
        last = numbers[name]
    shapes = [weight.shape for weight, _, _ in layers]
    if not layers or shapes[-1][0] != 1 or any(after[1] != before[0] for before, after in pairwise(shapes)):
        raise ValueError(f"layers of shapes {shapes}")
    return layers
