"""Pictures of any size to the size of a video, as training crops them: the centre is cut to shape, then scaled.

Plain numpy in float64, so that the pixels, and with them the codes, are the same on every machine. What a curation
scales by OpenCV is the same but for single levels of 255.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_CUBIC_SHARPNESS = -0.75  # of the kernel; OpenCV's
_CUBIC_UNIT = 2048  # in 1/2048, as OpenCV rounds the kernel
_MAX_ROUNDING = 4  # decimals beyond which sums differ by the order of addition


def centre_cut(
    picture: Sequence[int], size: tuple[int, int], *, pixel_aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """The largest part (left, top, width, height) at the centre of a picture (likewise) that has the shape of ``size``.

    ``size`` is (width, height); ``pixel_aspect`` the width / height of the picture's pixels.
    """
    left, top, width, height = picture
    target = size[0] / size[1] / pixel_aspect  # width / height of the cut, in the picture's pixels
    cut_width = min(width, max(1, round(height * target)))
    cut_height = min(height, max(1, round(width / target)))
    return left + (width - cut_width) // 2, top + (height - cut_height) // 2, cut_width, cut_height


def fit_frames(frames: NDArray[np.uint8], size: tuple[int, int], *, pixel_aspect: float = 1.0) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3] cut and scaled to ``size`` (width, height): by area where they shrink, else by cubics."""
    height, width = frames.shape[1:3]
    left, top, cut_width, cut_height = centre_cut((0, 0, width, height), size, pixel_aspect=pixel_aspect)
    cut = frames[:, top : top + cut_height, left : left + cut_width]
    if (cut_width, cut_height) == size:
        return np.ascontiguousarray(cut)
    shrinks = cut_width >= size[0] and cut_height >= size[1]
    weights = _area_weights if shrinks else _cubic_weights
    rows, columns = weights(cut_height, size[1]), weights(cut_width, size[0])
    halves_up = shrinks and (cut_width, cut_height) == (2 * size[0], 2 * size[1])
    return np.stack([_scaled(picture, rows, columns, halves_up=halves_up) for picture in cut])


def _scaled(
    picture: NDArray[np.uint8], rows: NDArray[np.float64], columns: NDArray[np.float64], *, halves_up: bool
) -> NDArray[np.uint8]:
    by_row = np.tensordot(rows, picture.astype(np.float64), (1, 0))
    values = np.tensordot(columns, by_row, (1, 1)).transpose(1, 0, 2).round(_MAX_ROUNDING)
    whole = np.floor(values + 0.5) if halves_up else np.rint(values)
    return whole.clip(0, 255).astype(np.uint8)


def _area_weights(source: int, target: int) -> NDArray[np.float64]:
    """Shares [target, source] of the old pixels in the new ones, which cover several each."""
    edges = np.arange(target + 1) * (source / target)
    begins = np.arange(source)
    shares = np.minimum(edges[1:, None], begins + 1) - np.maximum(edges[:-1, None], begins)
    shares = shares.clip(0)
    normalized: NDArray[np.float64] = shares / shares.sum(1, keepdims=True)
    return normalized


def _cubic_weights(source: int, target: int) -> NDArray[np.float64]:
    """Weights [target, source] of the four old pixels nearest to each new one; border pixels stand for those beyond."""
    places = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(places).astype(np.int64)
    t, a = places - first, _CUBIC_SHARPNESS
    outer = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a
    inner = ((a + 2) * t - (a + 3)) * t**2 + 1
    other = ((a + 2) * (1 - t) - (a + 3)) * (1 - t) ** 2 + 1
    taps = np.rint(np.stack([outer, inner, other, 1 - outer - inner - other]) * _CUBIC_UNIT) / _CUBIC_UNIT
    weights = np.zeros((target, source))
    for offset, tap in zip(range(-1, 3), taps, strict=True):
        np.add.at(weights, (np.arange(target), (first + offset).clip(0, source - 1)), tap)
    return weights
