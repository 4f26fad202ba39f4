"""Plots from characters."""

import io
import sys

import pytest

from actcache_cli.terminal_plots import fit, plot, shade, sparkline, width_of


def ascii_only(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))


def test_a_sparkline_is_proportional_and_shows_the_smallest_count():
    assert sparkline([0, 1, 400, 800], 4) == " ▁▄█"


def test_bins_share_the_columns_evenly():
    assert sparkline([0, 8], 7) == "   ███"
    assert len(sparkline([1] * 100, 30)) == 25
    assert sparkline([1, 0, 0, 0, 0, 0, 0, 2], 2) == "▄█"


@pytest.mark.parametrize("counts", [[], [0, 0], [-5, -1]])
def test_empty_counts_are_drawn_blank(counts):
    assert sparkline(counts, 10).strip() == ""
    assert plot(counts, [1.0] * (len(counts) + 1), 40) == ["no finite rows"]


def test_counts_beyond_floating_point_are_drawn():
    assert sparkline([1, 2**70], 2) == "▁█"


def test_ascii_characters_replace_blocks_that_cannot_be_encoded(monkeypatch):
    ascii_only(monkeypatch)
    for text in (sparkline([0, 1, 400, 800], 4), shade(0.9), fit("layers.10.mlp", 8)):
        text.encode("ascii")
    "".join(plot([1, 2], [1.0, 2.0, 3.0], 40)).encode("ascii")


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_plot_fits_its_columns_and_labels_its_edges(columns):
    lines = plot([3, 9, 30, 2], [16.0, 19.03, 22.63, 26.91, 32.0], columns)
    assert max(map(len, lines)) <= columns
    assert len(lines) == 9
    assert lines[0].startswith("68.2%")
    assert lines[-1].split()[0] == "16"
    assert [edge in lines[-1] for edge in ("22.63", "32")] == [True, columns > 40]


def test_the_middle_of_a_long_name_is_cut_out():
    assert fit("layers.10", 9) == "layers.10"
    assert fit("layers.10.self_attn.q_proj", 11) == "layer…_proj"


def test_shades_grow_with_the_cosine_and_negative_ones_are_marked():
    assert [shade(c) for c in (0.0, 0.3, 0.5, 0.7, 1.0)] == ["  ", "░░", "▒▒", "▓▓", "██"]
    assert shade(-0.5) == "-▒"
    assert shade(None) == "  "


def test_wide_characters_take_two_columns():
    assert [width_of(text) for text in ("abc", "日本", "e\u0301")] == [3, 4, 1]
