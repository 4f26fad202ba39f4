"""The facts about a cache as one self-contained HTML page: no script, no font, no network.

All elements are made by `markup.tag`, so text from the cache cannot become markup. The page's
content security policy permits only its own style.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from actcache.core.progress import format_bytes
from actcache.format.statistics import NEAR_OVERFLOW
from actcache.inspection.dimensions import OUTLIER
from actcache.inspection.facts import (
    cache_facts,
    dimension_table,
    file_table,
    format_number,
    hookpoint_columns,
    rank_table,
)
from actcache.inspection.html import svg
from actcache.inspection.html.markup import Markup, join, scroll, section, table, tag
from actcache.inspection.norms import edge, span_of
from actcache.inspection.samples import SequenceView, Token
from actcache.inspection.shards import ShardFacts
from actcache.inspection.summary import CacheSummary, HookpointSummary

LINES = 40
"""Largest number of shards, ranks or files in a plot or table."""
CARDS = 64
"""Largest number of hookpoints with plots of their own, and in the heat map."""
TABLE = 500
"""Largest number of hookpoints in the table."""
TOKENS = 4096
"""Largest number of tokens shown of a sequence."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_HEAT = [(0.25, "h1"), (0.6, "h2"), (1.0, "h3"), (1.6, "h4"), (2.5, "h5")]
"""Classes of tokens by the least number of octaves above the median norm."""
_COLD = [(-0.4, "l1"), (-1.0, "l2")]
"""Classes of tokens by the least number of octaves below it."""


def render_page(
    summary: CacheSummary, views: Sequence[SequenceView] = (), shard: ShardFacts | None = None
) -> str:
    """Render the page.

    Args:
        summary: the facts.
        views: sequences to show in full.
        shard: the one shard that the facts describe, if it is one.
    """
    name = Path(summary.cache).name or summary.cache
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{name}: activations of {summary.model}"),
        tag("style", Markup(style)),
    )
    facts = cache_facts(summary, shard)
    sections = [
        _header(summary, name, facts, shard),
        _left_out(summary),
        _hookpoints(summary),
        _cards(summary),
        _cosines(summary),
        _bad_rows(summary, facts["numbers"]),
        _speed(summary),
        _files(shard),
        _texts(summary, views),
    ]
    footer = tag("footer", f"actcache inspect, cache id {summary.cache_id}")
    body = tag("body", tag("main", *sections), footer)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _header(
    summary: CacheSummary, name: str, facts: dict[str, str], shard: ShardFacts | None
) -> Markup:
    tiles = {
        "rows": f"{summary.rows:,}",
        "tokens": f"{summary.tokens:,}",
        "hookpoints": str(len(summary.hookpoints)),
        "shards" if shard is None else "shard": (
            f"{summary.shards:,}" if shard is None else f"number {shard.shard}"
        ),
        "on disk": format_bytes(summary.bytes),
    }
    if summary.speed:
        rate = sum(speed.tokens_per_second for speed in summary.speed)
        tiles["tokens/s when harvested"] = f"{rate:,.0f}"
    above = {"model", "dataset", "state"}  # shown in the heading
    details = [join(tag("dt", k), tag("dd", v)) for k, v in facts.items() if k not in above]
    return tag(
        "header",
        tag("h1", name),
        tag("p", f"{summary.model} on {summary.dataset}", class_="sub"),
        tag("span", summary.state, class_="state" if summary.complete else "state open"),
        tag(
            "ul",
            *(tag("li", tag("b", v), tag("span", k)) for k, v in tiles.items()),
            class_="tiles",
        ),
        tag("dl", *details),
    )


def _muted(text: str) -> Markup:
    return tag("p", text, class_="muted")


def _more(count: int, what: str) -> Markup:
    return _muted(f"and {count:,} more {what}") if count else Markup("")


def _left_out(summary: CacheSummary) -> Markup:
    if not summary.excluded:
        return section("Positions left out", tag("p", "None: every position is a row."))
    kept = summary.rows / max(summary.tokens, 1)
    shares = [("kept", kept, summary.rows)]
    shares += [(e.name, e.fraction, e.positions) for e in summary.excluded]
    kinds = [f"k{min(i, 4)}" for i in range(len(shares))]
    bars = [
        tag("span", style=f"width:{100 * share:.3f}%", title=f"{name}: {share:.2%}", class_=kind)
        for (name, share, _), kind in zip(shares, kinds, strict=True)
    ]
    rows: list[list[str]] = [
        [join(tag("span", class_=f"key {kind}"), name), f"{share:.2%}", f"{count:,}"]
        for (name, share, count), kind in zip(shares, kinds, strict=True)
    ]
    return section(
        "Positions left out",
        tag("div", *bars, class_="share", role="img", aria_label=f"{kept:.2%} kept"),
        table(["filter", "of all positions", "positions"], rows),
    )


def _hookpoints(summary: CacheSummary) -> Markup:
    """Tabulate sizes, norms and counts of the hookpoints."""
    shown = summary.hookpoints[:TABLE]
    first, end = span_of([h.norms for h in summary.hookpoints])
    columns = hookpoint_columns(shown)
    columns[f"norms, {format_number(edge(first), 3)} to {format_number(edge(end), 3)}"] = [
        svg.norm_spark(h.norms, first, end, f"norms of {h.hookpoint}") for h in shown
    ]
    return section(
        "Hookpoints",
        _muted("Norms on one logarithmic scale; bars relative to each hookpoint's tallest."),
        table(list(columns), list(zip(*columns.values(), strict=True))),
        _more(len(summary.hookpoints) - len(shown), "hookpoints"),
    )


def _cards(summary: CacheSummary) -> Markup:
    """Render histogram and dimensions of each hookpoint."""
    shown = summary.hookpoints[:CARDS]
    more = len(summary.hookpoints) - len(shown)
    legend = (
        f"An outlier (orange) has an RMS, or a largest |x|, of at least {OUTLIER:g} times the "
        "median dimension's (dashed)."
    )
    if more:
        legend += f" The first {CARDS} hookpoints; {more} more are in the table."
    cards = tag("div", *(_card(h) for h in shown), class_="cards")
    return section("Norms and dimensions", _muted(legend), cards)


def _card(h: HookpointSummary) -> Markup:
    median, high = (format_number(h.norms.quantile(q), 3) for q in (0.5, 0.99))
    quantiles = f"median {median}, 1% above {high}"
    step = h.dimensions.profile_step
    each = "" if step == 1 else f", the largest of every {step}"
    outliers = f"outliers: {h.dimensions.outliers}"
    dimensions = svg.dimension_plot(
        h.dimensions, h.width, f"{h.hookpoint}: RMS by dimension, {outliers}"
    )
    return tag(
        "article",
        tag("h3", h.hookpoint),
        tag(
            "figure",
            svg.norm_plot(h.norms, f"{h.hookpoint}: rows by norm, {quantiles}"),
            tag("figcaption", f"rows by norm; {quantiles}"),
        ),
        tag("figure", dimensions, tag("figcaption", f"RMS by dimension{each}; {outliers}")),
        table(*dimension_table(h.dimensions.largest[:5])),
        class_="card",
    )


def _cosines(summary: CacheSummary) -> Markup:
    """Draw the cosines between mean rows as a heat map."""
    matrix = [line[:CARDS] for line in summary.mean_cosines[:CARDS]]
    if len(matrix) < 2:
        return Markup("")
    names = [h.hookpoint for h in summary.hookpoints[: len(matrix)]]
    legend = _muted("Cosine of the angle between mean rows: blue towards 1, orange below 0.")
    plot = svg.heat_map(matrix, names, "cosine of mean rows between hookpoints")
    return section("How alike the means are", legend, scroll(plot))


def _bad_rows(summary: CacheSummary, numbers: str) -> Markup:
    found = summary.afflictions
    title = "Non-finite and near overflow"
    text = tag("p", f"{numbers}. Near overflow: an |x| of {NEAR_OVERFLOW:,.0f} or more.")
    if not found.shards:
        return section(title, text)
    shown = sorted(found.worst[:LINES], key=lambda shard: shard.shard)
    rows = []
    for shard in shown:
        bad, near = sum(shard.non_finite.values()), sum(shard.near_overflow.values())
        bars = [
            ("warn", float(bad), f"{bad:,} non-finite"),
            ("bar", float(near), f"{near:,} near"),
        ]
        rows.append((f"shard {shard.shard}", bars))
    plot = svg.bars(rows, "non-finite and near-overflow rows by shard")
    return section(title, text, scroll(plot), _more(found.shards - len(shown), "shards"))


def _speed(summary: CacheSummary) -> Markup:
    if not summary.speed:
        return Markup("")
    header, rows = rank_table(summary.speed[:LINES])
    bars = [
        (f"rank {rank.rank}", [("bar", rank.tokens_per_second, f"{row[1]} tokens/s, {row[2]}")])
        for rank, row in zip(summary.speed, rows, strict=False)
    ]
    plot = scroll(svg.bars(bars, "tokens per second by rank"))
    return section("Speed of the harvest", plot, table(header, rows))


def _files(shard: ShardFacts | None) -> Markup:
    if shard is None:
        return Markup("")
    files = table(*file_table(shard.files[:LINES]))
    more = _more(max(0, len(shard.files) - LINES), "files")
    return section(f"Files of shard {shard.shard}", files, more)


def _texts(summary: CacheSummary, views: Sequence[SequenceView]) -> Markup:
    """Render sequences with the norm of every token."""
    if not views:
        return Markup("")
    medians = {h.hookpoint: h.norms.quantile(0.5) for h in summary.hookpoints}
    first = views[0].hookpoint
    legend = tag(
        "p",
        f"Norms of {first} over the cache's median, {format_number(medians[first], 3)}: ",
        tag("span", "half", class_="l2"),
        " ",
        tag("span", "as it"),
        " ",
        *(join(tag("span", f"{2**octave:.3g}x", class_=kind), " ") for octave, kind in _HEAT),
        tag("span", "left out", class_="out"),
        "; point at a token for its norm.",
        class_="legend text",
    )
    cards = tag(
        "div", *(_sequence(view, medians[view.hookpoint]) for view in views), class_="cards"
    )
    return section("Text", legend, cards)


def _sequence(view: SequenceView, median: float) -> Markup:
    padding = sum(token.state == "padding" for token in view.tokens)
    spans = list(_spans(view.tokens[:TOKENS], median))
    if len(view.tokens) > TOKENS:
        spans.append(tag("span", f" [the first {TOKENS:,} of {len(view.tokens):,}]", class_="pad"))
    ids = all(token.text == str(token.id) for token in view.tokens)  # there was no tokenizer
    if padding:
        spans.append(tag("span", f" [{padding} positions of padding]", class_="pad"))
    title = f"Sequence {view.number:,} (shard {view.shard}, its {view.sequence})"
    text = tag("div", *spans, class_="text ids" if ids else "text")
    return tag("article", tag("h3", title), text, class_="card")


def _spans(tokens: Sequence[Token], median: float) -> Iterator[Markup]:
    for token in tokens:
        if token.state == "padding":
            continue
        text = token.text.replace("\r", "").replace("\t", "    ")
        norm = "left out" if token.norm is None else f"norm {token.norm:.4g}"
        yield tag(
            "span",
            text.replace("\n", "⏎\n"),
            class_=_heat(token, median),
            title=f"{norm}, position {token.position}, id {token.id}",
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
