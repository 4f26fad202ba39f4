"""Plots: XML with a title first, and with the given data."""

from xml.etree import ElementTree as ET

import numpy as np
import pytest

from actcache.inspection.dimensions import describe
from actcache.inspection.html import svg
from actcache.inspection.norms import NormHistogram, span_of

NORMS = NormHistogram(128, (1, 50, 0, 3))


def parsed(markup):
    element = ET.fromstring(markup)
    if element.tag == "svg":
        assert element[0].tag == "title"
        assert element[0].text
        assert element.get("role") == "img"
    return element


def test_a_histogram_has_a_proportional_bar_with_a_count_for_every_bin():
    bars = parsed(svg.norm_plot(NORMS, "norms")).findall("rect")
    assert len(bars) == 4
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[1] == max(heights)
    assert heights[2] == 0
    assert heights[0] > 0
    assert "50 rows" in bars[1].find("title").text


def test_a_spark_uses_the_common_scale():
    bars = parsed(svg.norm_spark(NORMS, 124, 140, "x")).findall("rect")
    assert float(bars[0].get("x")) == pytest.approx(180 * 4 / 16, abs=0.1)
    assert span_of([NORMS, NormHistogram(0, ()), NormHistogram(120, (1,))]) == (120, 132)


def test_each_dimension_has_a_point_and_each_outlier_a_mark(statistics_of):
    rows = np.random.RandomState(0).standard_normal((50, 12)).astype("<f4")
    rows[:, 4] *= 50
    found = describe(statistics_of(rows))
    plot = parsed(svg.dimension_plot(found, 12, "x"))
    assert len(plot.find("polyline").get("points").split()) == 12
    assert len(plot.findall("circle")) == 1
    assert "4" in [text.text for text in plot.findall("text")]


def test_a_heat_map_has_a_cell_for_every_pair():
    plot = parsed(svg.heat_map([[1.0, -0.5], [None, 1.0]], ["a", "b"], "x"))
    cells = plot.findall("rect")
    assert [cell.get("class") for cell in cells] == ["hot", "cold", "none", "hot"]
    assert cells[1].get("fill-opacity") == "0.50"
    assert cells[2].find("title").text == "b ~ a: different widths"


def test_bar_lengths_are_proportional_to_their_segments():
    rows = [
        ("a", [("warn", 1.0, "1 bad"), ("bar", 3.0, "3 near")]),
        ("b", [("bar", 2.0, "2 near")]),
    ]
    bars = parsed(svg.bars(rows, "x", room=400)).findall("rect")
    assert [float(bar.get("width")) for bar in bars] == [100.0, 300.0, 200.0]


@pytest.mark.parametrize("norms", [NormHistogram(0, ()), NormHistogram(0, (0, 0))])
def test_an_empty_histogram_is_described_by_text(norms):
    assert "No finite rows" in svg.norm_plot(norms, "x")
    parsed(svg.norm_spark(norms, 0, 1, "x"))


def test_invalid_statistics_are_drawn_without_an_error(statistics_of):
    whole = statistics_of(np.ones((3, 4)))
    for value in (np.nan, np.inf, 0.0):
        whole.total_squares[:] = value
        parsed(svg.dimension_plot(describe(whole), 4, "x"))
