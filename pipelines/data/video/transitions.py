"""A second measure of where shots change, which sees dissolves, fades and wipes, and cuts between pictures alike.

Of the frames around each step from a frame to the next it looks at how far all of them are from one another, in three
ways: the layout of light in the picture, whatever its brightness and contrast; its histogram, which does not mind that
things move; and the colours of each quarter, as a wipe comes to one after another. Around a cut the frames before are
far from those after, and each side is near to itself; in a dissolve those between lie on the line from one side to the
other; while the camera pans, frames are the farther from one another the later they come, on both sides alike. A small
network tells these apart; its weights are beside this module, and ``teach_transitions.py`` has taught it.

What is told of a source must not depend on the machine. In which order a CPU adds up a product of matrices is its own
affair, so all that is added is whole: vectors, distances and weights count in small fractions of one, and 64-bit floats
hold every sum of such products exactly. What else is computed is rounded alike everywhere, but for the last step's
exponential, whose last digits are rounded off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import combinations
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SURE = 0.5  # of 0..1, from which a step belongs to a transition
REACH = 20  # frames before and after a step that are looked at
WEIGHTS = "transitions.npz"
_WIDTH, _HEIGHT = 32, 18  # px of the pictures compared
_BINS = 16  # of a plane's histogram
_PLANE_BINS = np.arange(0, 3 * _BINS, _BINS, dtype=np.uint8)[:, None]  # number of each plane's first
_BELOW, _ABOVE = np.arange(-1, _BINS - 1).clip(0), np.arange(1, _BINS + 1).clip(max=_BINS - 1)
_GRAIN = 3.0  # levels of luma; a picture of no more contrast has no layout
_AWAY = (0, 1, 2, 3, 5, 7, 10, 14, 19)  # frames before and after a step that are compared with one another
_PAIRS = np.array(list(combinations([*(-1 - away for away in reversed(_AWAY)), *_AWAY], 2)))
_CHUNK = 128  # steps judged at once
_FASTEST = 1 / 32  # seconds between frames that are looked at, at least
_SHORT = 4  # frames between transitions, of which so few are part of one
_FLASH = 7  # frames from before a flash to after it
_HARD = 0.7  # of the way from one side of a transition to the other, which a cut goes in one step

# Parts of one in which numbers count: what describes a frame, distances, what is between layers, weights. Vectors are
# no longer than 8; of the weights that there are, no sum of a layer reaches 2^53, whatever the distances.
_VECTOR_PARTS, _DISTANCE_PARTS, _LAYER_PARTS, _WEIGHT_PARTS = 1 << 20, 1 << 16, 1 << 12, 1 << 16
_DIGITS = 4  # of how surely a step belongs to a transition

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Description = tuple[Doubles, ...]


@dataclass(frozen=True)
class Transition:
    """Where one shot gives way to another."""

    first: int  # first frame that does not show the one shot alone
    stop: int  # first frame that shows the other alone; of a cut, ``first`` where every frame was looked at
    is_cut: bool = False  # whether it is one step


@dataclass(frozen=True)
class Judgement:
    """What is known of a source once all of its frames have been seen."""

    transitions: list[Transition]
    sure: Floats  # of each frame, how surely the step to it belongs to a transition, 0..1
    across: Floats  # of each frame, how far the layouts before and after a flash there would be apart, 0..1.4
    looked: NDArray[np.int64]  # numbers of the frames that were looked at; of all others nothing is known


def describe(planes: NDArray[np.uint8]) -> Description:
    """What of a frame (Y, Cb and Cr, [3, height, width]) is compared: layout, histogram, quarters; a vector each.

    They are whole numbers, in parts of ``1 / _VECTOR_PARTS``.
    """
    size = (_WIDTH, _HEIGHT)
    small = np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes])
    luma = small[0].ravel().astype(np.float64)
    count = luma.size
    layout = count * luma - luma.sum()  # times the number of pixels, so that it is whole
    length = np.sqrt(layout @ layout + (count * _GRAIN) ** 2 * count)
    bins = small.reshape(3, -1) // (256 // _BINS) + _PLANE_BINS
    counts = np.bincount(bins.ravel(), minlength=3 * _BINS).reshape(3, _BINS)
    # Neighbouring bins share, so that a little more light is a little difference.
    shared = 0.25 * counts[:, _BELOW] + 0.5 * counts + 0.25 * counts[:, _ABOVE]
    histogram = np.sqrt(shared.ravel() / small.size)
    quarters = small.reshape(3, 2, _HEIGHT // 2, 2, _WIDTH // 2).transpose(1, 3, 0, 2, 4).reshape(4, -1)
    vectors = (layout / length, histogram, *(quarters / (32 * np.sqrt(quarters.shape[1]))))
    return tuple(np.rint(vector * _VECTOR_PARTS) for vector in vectors)


def measure_steps(described: Sequence[Doubles]) -> Doubles:
    """The distances looked at: of frames described one after another, [n, d] of each kind, [n - 2 * REACH, f].

    The first row is of the step that leads to frame ``REACH``.
    """
    steps = np.arange(REACH, len(described[0]) - REACH)[:, None]
    one, other = steps + _PAIRS[:, 0], steps + _PAIRS[:, 1]
    found = []
    for vectors in described:
        products = vectors @ vectors.T
        squares = np.diagonal(products)
        found.append(np.sqrt(squares[one] + squares[other] - 2 * products[one, other]) / _VECTOR_PARTS)
    return np.concatenate(found, axis=1)


@cache
def _network() -> list[tuple[Doubles, Doubles]]:
    """Weights, in parts of ``1 / _WEIGHT_PARTS``, and biases of each layer."""
    with resources.files(__package__).joinpath(WEIGHTS).open("rb") as file:
        stored: Any = np.load(file, allow_pickle=False)
        layers = [(stored[f"w{layer}"].astype(np.float64), stored[f"b{layer}"].astype(np.float64)) for layer in "123"]
    return [(np.rint(weights * _WEIGHT_PARTS), biases) for weights, biases in layers]


def judge(measured: Doubles) -> Floats:
    """How surely each step belongs to a transition, 0..1."""
    values, parts = measured, _DISTANCE_PARTS
    for weights, biases in _network():
        sums = np.rint(values.clip(min=0) * parts) @ weights  # what a layer gives below 0, the next one sees as 0
        values, parts = sums / (parts * _WEIGHT_PARTS) + biases, _LAYER_PARTS
    sure = 1 / (1 + np.exp(-values[:, 0].clip(-30, 30)))
    return np.asarray(sure.round(_DIGITS), np.float32)


class TransitionMeter:
    """Judges the steps of a source from frame to frame; frames to be skipped show what the one before them does."""

    def __init__(self) -> None:
        self._described: list[Description] = []  # of frames looked at, those that are still needed
        self._looked: list[int] = []  # numbers of all that were looked at
        self._until: list[int] = []  # number of the last that repeats each of them
        self._judged: list[Floats] = []
        self._across: list[float] = []  # of each frame looked at, the distance of layouts from one _FLASH before
        self._jumps: list[float] = []  # how far each frame looked at is from the one before
        self._last = -np.inf
        self._index = -1

    def add(self, time: float, planes: NDArray[np.uint8], *, skip: bool = False) -> None:
        """See the next frame: Y, Cb and Cr, [3, height, width]."""
        self._index += 1
        if skip and self._until and self._until[-1] == self._index - 1:
            self._until[-1] = self._index
        if skip or time - self._last < _FASTEST - 1e-3:
            return
        self._last = time
        described = describe(planes)
        self._jumps.append(_distance(self._described[-1], described) if self._looked else 0.0)
        self._looked.append(self._index)
        self._until.append(self._index)
        # A film begins as if its first frame had been there for long.
        self._described += [described] * (REACH + 1 if len(self._looked) == 1 else 1)
        self._across.append(_length(self._described[-1 - _FLASH][0] - described[0]))
        if len(self._described) == _CHUNK + 2 * REACH:
            self._judge()

    def _judge(self) -> None:
        self._judged.append(judge(measure_steps([np.stack(kind) for kind in zip(*self._described, strict=True)])))
        del self._described[: -2 * REACH]

    def finish(self) -> Judgement:
        """Judge what is left, once all frames have been seen."""
        sure, across = np.zeros((2, self._index + 1), np.float32)
        if len(self._looked) < 2:
            return Judgement([], sure, across, np.array(self._looked, np.int64))
        self._described += [self._described[-1]] * REACH
        self._judge()
        judged = np.concatenate(self._judged)[: len(self._looked)]  # of the step that leads to each
        judged[0] = 0
        sure[self._looked] = judged
        after = np.minimum(np.arange(len(judged)) + _FLASH // 2, len(judged) - 1)
        across[self._looked] = np.array(self._across)[after]
        edges = np.diff(np.concatenate([[0], judged >= SURE, [0]]).astype(np.int8))
        starts, stops = np.flatnonzero(edges > 0), np.flatnonzero(edges < 0)
        found: list[Transition] = []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            each = self._transition(start, stop)
            if found and each.first - found[-1].stop <= _SHORT:  # what lies between is no shot
                each = Transition(found.pop().first, each.stop)
            found.append(each if each.first > _SHORT else Transition(0, each.stop))
        return Judgement(found, sure, across, np.array(self._looked))

    def _transition(self, start: int, stop: int) -> Transition:
        """That of steps ``start`` up to but not including ``stop``; a cut, if one of them goes most of the way."""
        jumps = self._jumps[start:stop]
        if max(jumps) >= _HARD * sum(jumps):
            start += int(np.argmax(jumps))
            stop = start + 1
        return Transition(self._until[start - 1] + 1, self._looked[stop - 1], stop == start + 1)


def _distance(one: Description, other: Description) -> float:
    return sum(_length(first - second) for first, second in zip(one, other, strict=True))


def _length(vector: Doubles) -> float:
    return float(np.sqrt(vector @ vector)) / _VECTOR_PARTS
