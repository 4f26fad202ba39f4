"""Plots from block characters, or ASCII where the encoding lacks them."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"
SHADES = " ░▒▓█"
ASCII_BLOCKS = " .:-=+*#@"
ASCII_SHADES = " .+*#"


def can_draw() -> bool:
    """Return whether stdout's encoding has block characters."""
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def sparkline(counts: Sequence[int], columns: int) -> str:
    """Draw counts as one line of bars; every count above 0 is visible.

    Args:
        counts: one for each bin.
        columns: largest number of characters. Each bin takes the same number of columns, or each
            column the same number of bins.
    """
    blocks = BLOCKS if can_draw() else ASCII_BLOCKS
    bins = _regroup(counts, columns)
    top = max(bins, default=0)
    heights = [0 if n <= 0 else max(1, round(8 * n / top)) for n in bins]
    return "".join(blocks[height] for height in heights)


def plot(counts: Sequence[int], edges: Sequence[float], columns: int, rows: int = 8) -> list[str]:
    """Draw a histogram of several lines: percent of all on the left, edges of bins below.

    Args:
        counts: one for each bin.
        edges: edges of the bins, one more than counts.
        columns: total width.
        rows: height of the bars.
    """
    blocks, bar = (BLOCKS, "│") if can_draw() else (ASCII_BLOCKS, "|")
    margin = 7
    bins = _regroup(counts, columns - margin, widest=8)
    top, total = max(bins, default=0), sum(counts)
    if top <= 0:
        return ["no finite rows"]
    lines = []
    for row in reversed(range(rows)):
        bars = ""
        for n in bins:
            height = 0 if n <= 0 else max(1, round(8 * rows * n / top))
            bars += blocks[min(8, max(0, height - 8 * row))]
        share = f"{top / total:.1%}" if row == rows - 1 else ("0" if row == 0 else "")
        lines.append(f"{share:>{margin - 2}} {bar}{bars}".rstrip())
    axis = [" "] * (columns - margin)
    per_edge = max(len(bins), 1) / max(len(edges) - 1, 1)  # columns from one edge to the next
    free = 0
    for number, edge in enumerate(edges):
        label, at = f"{edge:,.4g}", int(number * per_edge)
        if at >= free and at + len(label) <= len(axis):
            axis[at : at + len(label)] = label
            free = at + len(label) + 2
    lines.append((" " * margin + "".join(axis)).rstrip())
    return lines


def shade(value: float | None) -> str:
    """Draw a cosine as two characters: darker towards 1, with a minus below 0."""
    if value is None:
        return "  "
    shades = SHADES if can_draw() else ASCII_SHADES
    mark = shades[min(4, int(abs(value) * 5))]
    return mark * 2 if value > -0.05 else "-" + mark


def fit(text: str, columns: int) -> str:
    """Shorten a name to at most `columns` characters by cutting out its middle."""
    if len(text) <= columns:
        return text
    tail = (columns - 1) // 2
    return text[: columns - 1 - tail] + ("…" if can_draw() else "~") + text[len(text) - tail :]


def width_of(text: str) -> int:
    """Return the number of columns that a text takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    marks = sum(unicodedata.combining(c) != 0 for c in text)
    return len(text) + wide - marks


def _regroup(counts: Sequence[int], columns: int, widest: int = 4) -> list[int]:
    """Repeat each bin, or sum groups of bins, to fill up to `columns` columns evenly."""
    if not counts or columns <= 0:
        return []
    if len(counts) <= columns:
        return [n for n in counts for _ in range(min(columns // len(counts), widest))]
    size = -(-len(counts) // columns)
    return [sum(counts[i : i + size]) for i in range(0, len(counts), size)]
