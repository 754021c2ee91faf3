"""Line charts as inline SVG, without a plotting library; the page's CSS colours them, in light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 96, 14, 40  # margins; names of the lines stand in the right one
_LABEL_GAP = 14  # least distance between names of lines


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: Written at the line's end; empty for none.
        style: CSS class of the line and its name.
        points: (x, y) in order of x; points that are not finite are left out.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> str:
    """Draw lines over shared axes; the y axis begins at 0.

    Args:
        lines: Drawn in order, later ones on top.
        title: Read out by screen readers.
        x_label: Below the x axis.
        y_label: Above the y axis.

    Returns:
        An <svg> element, or a <p> where there is nothing to draw.
    """
    drawn = [(line, [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]) for line in lines]
    every = [point for _, points in drawn for point in points]
    if not every:
        return "<p>No figures were recorded.</p>"
    x_ticks = _ticks(min(x for x, _ in every), max(x for x, _ in every), 5)
    y_ticks = _ticks(0.0, max(y for _, y in every), 5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        upward = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - upward * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        left, y = place(x_ticks[0], tick)
        right, _ = place(x_ticks[-1], tick)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, bottom = place(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{tick:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="axis" x="{_LEFT + 8}" y="{_TOP + 12}">{escape(y_label)}</text>')
    for line, points in drawn:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in points))
        if path:
            parts.append(f'<path class="line {line.style}" d="M{path}"/>')
    ends = [(line, place(*points[-1])[1]) for line, points in drawn if line.name and points]
    for (line, _), y in zip(ends, _spread([y for _, y in ends]), strict=True):
        parts.append(
            f'<text class="name {line.style}" x="{_WIDTH - _RIGHT + 8}" y="{y + 4:.1f}">{escape(line.name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Mean of each point and its neighbours on both sides, up to `window` points in all, the same number each side."""
    means = []
    for index, (x, _) in enumerate(points):
        reach = min(window // 2, index, len(points) - 1 - index)
        near = [y for _, y in points[index - reach : index + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values; the first is at or below `low`, the last at or above `high`."""
    if high <= low:
        high = low + 1.0
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _spread(heights: Sequence[float]) -> list[float]:
    """Move labels apart that would overlap, keeping their order."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [heights[index] for index in order]
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + _LABEL_GAP)
    if placed:  # pushed down only so far; now centre them on the lines again
        shift = (sum(placed) - sum(heights)) / len(placed)
        placed = [height - shift for height in placed]
    bottom = float(_HEIGHT - _BOTTOM)
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], bottom)
        bottom = placed[index] - _LABEL_GAP
    result = [0.0] * len(heights)
    for position, index in enumerate(order):
        result[index] = placed[position]
    return result
