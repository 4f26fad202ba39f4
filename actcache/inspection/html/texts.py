"""Sequences on the page, every token on the colour of its norm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from actcache.inspection.html import svg
from actcache.inspection.html.markup import Markup, join, section, tag
from actcache.inspection.samples import SequenceView, Token
from actcache.inspection.summary import CacheSummary

TOKENS = 4096
"""Tokens of a sequence that are shown."""
_HEAT = [(0.25, "h1"), (0.6, "h2"), (1.0, "h3"), (1.6, "h4"), (2.5, "h5")]
"""Classes of tokens from so many octaves above the median norm."""
_COLD = [(-0.4, "l1"), (-1.0, "l2")]
"""Classes of tokens from so many octaves below it."""


def texts(summary: CacheSummary, readings: Sequence[SequenceView]) -> Markup:
    """Sequences with the norm of every token."""
    if not readings:
        return Markup("")
    medians = {h.hookpoint: h.norms.quantile(0.5) for h in summary.hookpoints}
    first = readings[0].hookpoint
    legend = tag(
        "p",
        f"Norms of {first} over the cache's median, {svg.number(medians[first])}: ",
        tag("span", "half", class_="l2"),
        " ",
        tag("span", "as it"),
        " ",
        *(join(tag("span", f"{2**octave:.3g}x", class_=kind), " ") for octave, kind in _HEAT),
        tag("span", "left out", class_="out"),
        "; point at a token for its norm.",
        class_="legend text",
    )
    return section(
        "Text", legend, tag("div", *(_reading(r, medians) for r in readings), class_="cards")
    )


def _reading(reading: SequenceView, medians: dict[str, float]) -> Markup:
    padding = sum(token.state == "padding" for token in reading.tokens)
    spans = list(_spans(reading.tokens[:TOKENS], medians[reading.hookpoint]))
    if len(reading.tokens) > TOKENS:
        spans.append(
            tag("span", f" [the first {TOKENS:,} of {len(reading.tokens):,}]", class_="pad")
        )
    ids = all(token.text == str(token.id) for token in reading.tokens)  # there was no tokenizer
    if padding:
        spans.append(tag("span", f" [{padding} positions of padding]", class_="pad"))
    title = f"Sequence {reading.number:,} (shard {reading.shard}, its {reading.sequence})"
    return tag(
        "article",
        tag("h3", title),
        tag("div", *spans, class_="text ids" if ids else "text"),
        class_="card",
    )


def _spans(tokens: Sequence[Token], median: float) -> Iterator[Markup]:
    for token in tokens:
        if token.state == "padding":
            continue
        text = token.text.replace("\r", "").replace("\t", "    ")
        said = "left out" if token.norm is None else f"norm {token.norm:.4g}"
        yield tag(
            "span",
            text.replace("\n", "⏎\n"),
            class_=_heat(token, median),
            title=f"{said}, position {token.position}, id {token.id}",
        )


def _heat(token: Token, median: float) -> str | None:
    if token.norm is None:
        return "out"
    if not (token.norm > 0 and median > 0 and math.isfinite(token.norm)):
        return "h5"
    octave = math.log2(token.norm / median)
    hot = [kind for bound, kind in _HEAT if octave >= bound]
    cold = [kind for bound, kind in _COLD if octave <= bound]
    kinds = hot or cold
    return kinds[-1] if kinds else None
