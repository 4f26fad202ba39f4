"""`actcache inspect --text`: sequences with the norm of every token below it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from actcache.inspection.printable import visible
from actcache.inspection.samples import SequenceView, Token

from ..terminal_plots import width_of

_GAP = "  "
_RESET = "\x1b[0m"
_LEFT_OUT = "\x1b[2m"  # faint
_OCTAVES = [(-1.0, "\x1b[36m"), (0.5, ""), (1.0, "\x1b[33m"), (2.0, "\x1b[1;33m")]
"""Colours by the upper bound of log2(norm / median norm)."""
_BEYOND = "\x1b[1;31m"
LEGEND = "- left out by a filter; · space, ⏎ end of line"


def draw(view: SequenceView, median: float, width: int, *, colour: bool) -> str:
    """Render one sequence: lines of tokens, with a line of norms below each.

    Args:
        view: the sequence.
        median: median norm, which colours are relative to.
        width: columns to fill.
        colour: mark tokens with norms far from the median by escape sequences.
    """
    norms = [token.norm for token in view.tokens if token.norm is not None]
    out = sum(token.state == "left out" for token in view.tokens)
    padding = sum(token.state == "padding" for token in view.tokens)
    facts = [f"shard {view.shard}, sequence {view.sequence} (of the harvest: {view.number:,})"]
    if norms:
        facts.append(f"{view.hookpoint} norms {min(norms):.4g} to {max(norms):.4g}")
    facts.append(f"{len(norms):,} rows, {out:,} left out, {padding:,} padding")
    lines = ["; ".join(facts)]
    for row in _rows(view, width):
        cells = [_cell(token, median, colour) for token in row]
        lines += [_GAP.join(line).rstrip() for line in zip(*cells, strict=True)]
    if padding:
        lines.append(f"[{padding} positions of padding]")
    return "\n".join(lines) + "\n\n"


def _rows(view: SequenceView, width: int) -> Iterator[list[Token]]:
    """Split the tokens, without padding, into lines that fit."""
    row: list[Token] = []
    taken = 0
    for token in view.tokens:
        if token.state == "padding":
            continue
        needed = max(map(width_of, _texts(token))) + len(_GAP)
        if row and taken + needed > width:
            yield row
            row, taken = [], 0
        row.append(token)
        taken += needed
    if row:
        yield row


def _cell(token: Token, median: float, colour: bool) -> tuple[str, str]:
    """Pad token and norm to the same width."""
    text, norm = _texts(token)
    width = max(width_of(text), width_of(norm))
    cells = text + " " * (width - width_of(text)), norm + " " * (width - width_of(norm))
    style = _style(token, median) if colour else ""
    if not style:
        return cells
    return f"{style}{cells[0]}{_RESET}", f"{style}{cells[1]}{_RESET}"


def _texts(token: Token) -> tuple[str, str]:
    return visible(token.text), "-" if token.norm is None else f"{token.norm:.4g}"


def _style(token: Token, median: float) -> str:
    if token.norm is None:
        return _LEFT_OUT
    if not (token.norm > 0 and median > 0 and math.isfinite(token.norm)):
        return _BEYOND
    octave = math.log2(token.norm / median)
    return next((style for bound, style in _OCTAVES if octave <= bound), _BEYOND)
