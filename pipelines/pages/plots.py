"""Plots as inline SVG, drawn by matplotlib; the page's stylesheet colours them, in light and dark.

Matplotlib takes half a second to import: only what draws does so.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = NDArray[np.float64]
Points = Sequence[tuple[float, float]]

# Variables of the stylesheet. Each is drawn in a colour that stands for it, and put in that colour's place afterwards.
_NUM_SERIES = 6
_NAMES = ("soft", "rule", "kept", "rejected", "threshold", *(f"series-{i}" for i in range(_NUM_SERIES)))
_COLORS = {name: f"#{index:06x}" for index, name in enumerate(_NAMES, start=1)}

_DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))
_BINS = 30
_LINE_HEIGHT = 0.08  # of a name beside a line's end, as a share of the axes' height
_POINTS = 72  # an inch: matplotlib measures figures in inches, and SVG's units are its points
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": _COLORS["soft"],
    "axes.labelcolor": _COLORS["soft"],
    "axes.titlesize": "medium",
    "axes.edgecolor": _COLORS["rule"],
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **{f"{axis}tick.color": _COLORS["rule"] for axis in "xy"},
    **{f"{axis}tick.labelcolor": _COLORS["soft"] for axis in "xy"},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    "xtick.major.pad": 6,
    "legend.frameon": False,
    "legend.handlelength": 3.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "lumos",
}


def line_chart(
    lines: Mapping[str, Points],
    *,
    title: str,
    x_label: str,
    y_label: str,
    faint: Sequence[str] = (),
    at_ends: bool = False,
    linear: bool = False,
) -> Markup | None:
    """Draw lines, each of its own colour and dashes, over a logarithmic y axis; None if there is nothing to draw.

    Args:
        lines: (x, y) in order of x by a line's name, later lines on top; without those whose y is not finite, or,
            over a logarithmic axis, not above 0.
        title: Read out by screen readers.
        x_label: Below the x axis.
        y_label: Above the y axis.
        faint: Names of lines that are drawn thin and pale, in the colour of the next that is not, as it is the mean of
            them; those that begin with an underscore are not in the legend.
        at_ends: Write the names at the right ends of the lines, in their colours, and no legend.
        linear: The y axis begins at 0 and is not logarithmic, as for shares.
    """
    drawn = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (linear or y > 0)] for name, points in lines.items()
    }
    if not any(drawn.values()):
        return None
    from matplotlib.ticker import LogLocator

    def draw(axes: Axes) -> None:
        if not linear:
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        index = 0
        for name, points in drawn.items():
            x, y = np.array(points).reshape(-1, 2).T
            color, dashes = _COLORS[f"series-{index % _NUM_SERIES}"], _DASHES[index % len(_DASHES)]
            if name in faint:
                axes.plot(x, y, color=color, alpha=0.4, linewidth=1, label=name, clip_on=False)
            else:
                axes.plot(x, y, color=color, linestyle=dashes, linewidth=2, label=name, clip_on=False)
                index += 1
        axes.margins(x=0)
        if linear:
            axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left")
        if at_ends:
            _name_ends(axes)
        else:
            axes.legend()

    return _plot(draw, size=(400, 260), margins=(36, 38, 24), title=title, right=62 if at_ends else 10)


def _name_ends(axes: Axes) -> None:
    """Write each line's name beside its last point, apart from one another where lines end together."""
    axes.autoscale_view()  # else the limits are those of no lines
    place = axes.transData + axes.transAxes.inverted()
    ends = sorted(
        ((float(place.transform(np.asarray(line.get_xydata())[-1])[1]), line) for line in axes.lines), key=itemgetter(0)
    )
    floor = 0.0
    for number, (height, line) in enumerate(ends):
        # No lower than its neighbour below allows, no higher than leaves room for those above.
        floor = max(floor, min(height, 1 - _LINE_HEIGHT * (len(ends) - 1 - number)))
        name, color = str(line.get_label()), line.get_color()
        axes.text(1.02, floor, name, color=color, transform=axes.transAxes, verticalalignment="center")
        floor += _LINE_HEIGHT


def histogram(name: str, groups: Mapping[str, Values], thresholds: Sequence[float] = ()) -> Markup:
    """Draw how often values of a score occur, one group on the other, and a dashed line at each threshold.

    Heights are square roots of counts.

    What lies far from nearly all values is told in words, as drawing it would leave no room for them.

    Args:
        name: Of the score.
        groups: Finite values by the name of a colour, from the bottom up; at least one in all.
        thresholds: What the score is compared with; one that is far from all values is not drawn.
    """
    values = np.concatenate(list(groups.values()))
    low, high = _plain_range(values)
    below, above = values[values < low], values[values > high]
    margin = (high - low) or 1  # within which a threshold is worth its room
    near = [bound for bound in thresholds if low - margin <= bound <= high + margin]
    low, high = min([low, *near]), max([high, *near])
    high = high if high > low else low + 1

    def draw(axes: Axes) -> None:
        base = np.zeros(_BINS)
        for color, members in groups.items():
            counts, edges = np.histogram(members, bins=_BINS, range=(low, high))
            axes.stairs(base + counts, edges, baseline=base, fill=True, color=_COLORS[color], clip_on=False)
            base = base + counts
        for bound in near:
            axes.axvline(bound, color=_COLORS["threshold"], linestyle="dashed", clip_on=False)
        axes.set_xlim(low, high)
        most = max(1, base.max())
        axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))  # few beside many
        axes.set_ylim(0, most)
        axes.set_yticks(sorted({0, round(most / 4), int(most)}))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.locator_params(axis="x", nbins=5)
        if len(below):
            axes.set_title(f"← {len(below)} more from {below.min():.4g}", loc="left")
        if len(above):
            axes.set_title(f"{len(above)} more up to {above.max():.4g} →", loc="right")

    sizes = ", ".join(f"{len(members)} {color}" for color, members in groups.items())
    title = f"Histogram of {name}: {sizes}, from {values.min():.4g} to {values.max():.4g}"
    words_height = 18 if len(below) or len(above) else 6
    return _plot(draw, size=(320, 130), margins=(34, 24, words_height), title=title)


def smooth(points: Points, window: int) -> Points:
    """Mean of each point and its neighbours on both sides, up to `window` points in all, the same number each side."""
    means = []
    for index, (x, _) in enumerate(points):
        reach = min(window // 2, index, len(points) - 1 - index)
        near = [y for _, y in points[index - reach : index + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def _plain_range(values: Values) -> tuple[float, float]:
    """The range of the values that are not far from most of them.

    Most are the middle half or, where that is of one value, the middle nine tenths.
    """
    for share, reach in ((0.25, 3.0), (0.05, 1.0)):
        low, high = np.quantile(values, share, method="higher"), np.quantile(values, 1 - share, method="lower")
        if low < high:
            far = reach * (high - low)
            values = values[(values >= low - far) & (values <= high + far)]
            break
    return float(values.min()), float(values.max())


def _plot(
    draw: Callable[[Axes], None], *, size: tuple[int, int], margins: tuple[int, int, int], title: str, right: int = 10
) -> Markup:
    """What `draw` draws on axes as an <svg> element, of a width and height in px.

    It must not clip, as clips are referred to by ids, of which a page has but one each. Margins are left of, below and
    above the axes, and to their right.
    """
    import matplotlib
    from matplotlib.figure import Figure

    (width, height), (left, bottom, top) = size, margins
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / _POINTS, height / _POINTS))
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=_COLORS["rule"], clip_on=False)
        draw(axes)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    drawing = re.sub(r' id="[^"]*"|font-family: [^;]*; ', "", drawing)
    for name, color in _COLORS.items():
        drawing = drawing.replace(color, f"var(--{name})")
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, title)
    return opening + Markup(drawing)
