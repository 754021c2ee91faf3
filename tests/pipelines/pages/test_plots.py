import itertools
import re
from importlib import resources
from xml.etree import ElementTree

import numpy as np
import pytest

from pipelines.pages import plots
from pipelines.pages.plots import histogram, line_chart, smooth

GENERATOR = np.random.default_rng(0)


def chart(points: list[tuple[float, float]], *more: str) -> str | None:
    lines = {"x": points, **dict.fromkeys(more, points)}
    return line_chart(lines, title="Loss <by> step", x_label="step", y_label="nats")


def widths(svg: str, color: str) -> list[float]:
    """Extent from left to right of what is drawn in a colour, one figure per shape."""
    found = []
    for path in re.findall(rf'<path d="([^"]*)"[^>]*?{re.escape(f"var(--{color})")}', svg):
        x = [float(pair.split()[0]) for pair in re.findall(r"[ML] ([-.\d]+ [-.\d]+)", path)]
        found.append(max(x) - min(x))
    return found


def words(svg: str) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)", svg))


@pytest.mark.parametrize("svg", [chart([(1, 5.0), (9, 2.0)], "y"), histogram("s", {"kept": GENERATOR.normal(size=99)})])
def test_a_plot_is_an_element_for_any_page(svg):
    ElementTree.fromstring(svg)
    # What has an id would be taken for that of another plot of the page; matplotlib's own colours suit one theme only.
    for foreign in (" id=", "url(#", "href", "http", "#", "font-family"):
        assert foreign not in svg
    style = (resources.files("pipelines.pages") / "style.css").read_text(encoding="utf-8")
    assert set(re.findall(r"var\((--[\w-]+)\)", svg)) <= set(re.findall(r"(--[\w-]+):", style))
    assert 'role="img"' in svg


def test_the_same_figures_are_drawn_alike():
    assert chart([(1, 5.0), (9, 2.0)], "y") == chart([(1, 5.0), (9, 2.0)], "y")


def test_a_chart_leaves_out_what_is_not_finite_and_tells_its_title():
    svg = chart([(1, 2.0), (2, float("nan")), (3, 1.0), (4, float("inf")), (5, 0.0)])
    assert "nan" not in svg.replace("nats", "")
    [line, _] = re.findall(r'<path d="([^"]*)"[^>]*var\(--series-0\)', svg)  # and its sample in the legend
    assert line.count("L") == 1
    assert 'aria-label="Loss &lt;by&gt; step"' in svg
    assert chart([]) is None
    assert chart([(1, float("nan"))]) is None


def test_lines_of_a_chart_can_be_told_apart():
    points = [(1.0, 5.0), (9.0, 2.0)]
    names = [f"frame {index}" for index in range(plots._NUM_SERIES)]
    svg = line_chart(dict.fromkeys(names, points), title="t", x_label="x", y_label="y")
    assert all(name in words(svg) for name in names)
    strokes = re.findall(r'style="fill: none; ([^"]*var\(--series-\d\)[^"]*)"', svg)
    assert len(set(strokes)) == len(names)
    assert len({stroke.partition("stroke: ")[0] for stroke in strokes}) == len(plots._DASHES)


def test_names_at_the_ends_of_lines_keep_apart_and_have_their_colors():
    ends = {"a": 2.0, "b": 2.01, "c": 5.0, "d": 2.02}
    lines = {name: [(1.0, 6.0), (9.0, end)] for name, end in ends.items()}
    svg = line_chart(lines, title="t", x_label="x", y_label="y", at_ends=True)
    places = {}
    for index, name in enumerate(ends):
        [(style, place)] = re.findall(rf'<text style="([^"]*)" x="[\d.]+" y="([\d.]+)"[^>]*>{name}<', svg)
        assert f"var(--series-{index})" in style
        places[name] = float(place)
    assert sorted(places, key=places.__getitem__, reverse=True) == ["a", "b", "d", "c"]
    heights = sorted(places.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) > 12
    assert all(0 < height < 260 for height in heights)


def test_an_outlier_is_told_and_leaves_the_others_their_room():
    plain = GENERATOR.normal(10, 1, 200)
    alone = histogram("s", {"kept": plain})
    spoiled = histogram("s", {"kept": np.append(plain, [4000.0, -70.0])})
    assert "more" not in words(alone)
    assert "1 more up to 4000" in words(spoiled)
    assert "1 more from -70" in words(spoiled)
    assert "from -70 to 4000" in spoiled
    [drawn] = widths(spoiled, "kept")
    assert drawn == pytest.approx(widths(alone, "kept")[0])
    assert spoiled.count("<text") >= 6  # the axis has its figures


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0, 3.0], [0.0, 1e9], [24.0] * 99 + [60.0]])
def test_few_or_equal_values_are_drawn(values):
    assert "var(--rejected)" in histogram("s", {"kept": np.zeros(0), "rejected": np.array(values)})


def test_a_threshold_is_drawn_unless_it_is_far_from_all_values():
    values = {"kept": np.linspace(0, 1, 50)}
    assert len(widths(histogram("s", values, [0.25, 1.5]), "threshold")) == 2
    assert widths(histogram("s", values, [30.0]), "threshold") == []


def test_smoothing_takes_neighbours_evenly_from_both_sides():
    assert smooth([(1, 4.0), (2, 2.0), (3, 0.0), (4, 4.0)], 3) == [(1, 4.0), (2, 2.0), (3, 2.0), (4, 4.0)]
