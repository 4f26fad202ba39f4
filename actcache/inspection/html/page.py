"""The facts about a cache as one HTML page that needs nothing else: no script, no font, no network.

It is made by `markup.tag` throughout, so nothing from the cache or its text can be markup; its
content security policy forbids all but its own style.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actcache.core.progress import format_bytes
from actcache.format.statistics import NEAR_OVERFLOW
from actcache.inspection.html import svg
from actcache.inspection.html.hookpoints import cards, cosines, hookpoints
from actcache.inspection.html.markup import Markup, join, scroll, section, table, tag
from actcache.inspection.html.texts import texts
from actcache.inspection.samples import SequenceView
from actcache.inspection.shards import ShardFacts
from actcache.inspection.summary import CacheSummary

LINES = 40
"""Shards, ranks or files that a plot or table has at most."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_page(
    summary: CacheSummary, readings: Sequence[SequenceView] = (), shard: ShardFacts | None = None
) -> str:
    """The page.

    Args:
        summary: the facts.
        readings: sequences to show in full.
        shard: the one shard that the facts are of, if they are.
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
    sections = [
        _header(summary, name, shard),
        _left_out(summary),
        hookpoints(summary),
        cards(summary),
        cosines(summary),
        _numbers(summary),
        _speed(summary),
        _files(shard),
        texts(summary, readings),
    ]
    footer = tag("footer", f"actcache inspect, cache id {summary.cache_id}")
    body = tag("body", tag("main", *sections), footer)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _header(summary: CacheSummary, name: str, shard: ShardFacts | None) -> Markup:
    part = f"{summary.shards:,}" if shard is None else f"number {shard.shard}"
    tiles = {
        "rows": f"{summary.rows:,}",
        "tokens": f"{summary.tokens:,}",
        "hookpoints": str(len(summary.hookpoints)),
        "shards" if shard is None else "shard": part,
        "on disk": format_bytes(summary.bytes),
    }
    if summary.speed:
        rate = sum(speed.tokens_per_second for speed in summary.speed)
        tiles["tokens/s when harvested"] = f"{rate:,.0f}"
    facts = {
        "text": summary.text,
        "filters": summary.filters,
        "on disk": f"{summary.hookpoints[0].dtype}, {summary.backend}",
        "folder": summary.cache,
    }
    if summary.without_statistics:
        facts["missing"] = (
            f"the statistics of {summary.without_statistics} shards cannot be read: norms and "
            "dimensions are without them"
        )
    lines = [join(tag("dt", key), tag("dd", fact)) for key, fact in facts.items()]
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
        tag("dl", *lines),
    )


def _left_out(summary: CacheSummary) -> Markup:
    if not summary.excluded:
        return section("Positions left out", tag("p", "None: every position is a row."))
    kept = summary.rows / max(summary.tokens, 1)
    shares = [("kept", kept, summary.rows)]
    shares += [(e.name, e.fraction, e.positions) for e in summary.excluded]
    kinds = [f"k{min(i, 4)}" for i in range(len(shares))]
    pieces = [
        tag("span", style=f"width:{100 * share:.3f}%", title=f"{name}: {share:.2%}", class_=kind)
        for (name, share, _), kind in zip(shares, kinds, strict=True)
    ]
    rows: list[list[str]] = [
        [join(tag("span", class_=f"key {kind}"), name), f"{share:.2%}", f"{count:,}"]
        for (name, share, count), kind in zip(shares, kinds, strict=True)
    ]
    return section(
        "Positions left out",
        tag("div", *pieces, class_="share", role="img", aria_label=f"{kept:.2%} kept"),
        table(["filter", "of all positions", "positions"], rows),
    )


def _numbers(summary: CacheSummary) -> Markup:
    found = summary.afflictions
    near = f"near float16's overflow (|x| from {NEAR_OVERFLOW:,.0f})"
    title = "Non-finite and near overflow"
    if not found.shards:
        return section(title, tag("p", f"Every number is finite, and no row is {near}."))
    said = (
        f"{found.non_finite:,} non-finite rows and {found.near_overflow:,} {near}, in "
        f"{found.shards:,} of {summary.shards:,} shards."
    )
    shown = sorted(found.worst[:LINES], key=lambda a: a.shard)
    rows = []
    for a in shown:
        bad, close = sum(a.non_finite.values()), sum(a.near_overflow.values())
        parts = [
            ("warn", float(bad), f"{bad:,} non-finite"),
            ("bar", float(close), f"{close:,} near"),
        ]
        rows.append((f"shard {a.shard}", parts))
    more = found.shards - len(shown)
    rest = tag("p", f"and {more:,} more shards", class_="muted") if more else Markup("")
    plot = svg.bars(rows, "non-finite and near-overflow rows by shard")
    return section(title, tag("p", said), scroll(plot), rest)


def _speed(summary: CacheSummary) -> Markup:
    if not summary.speed:
        return Markup("")
    rows = [
        (
            f"rank {s.rank}",
            [
                (
                    "bar",
                    s.tokens_per_second,
                    f"{s.tokens_per_second:,.0f} tokens/s, {format_bytes(s.bytes_per_second)}/s",
                )
            ],
        )
        for s in summary.speed[:LINES]
    ]
    details = [
        [
            str(s.rank),
            ", ".join(s.hosts),
            str(s.shards),
            f"{s.median_seconds:.3g} s",
            f"{s.slowest_seconds:.3g} s (shard {s.slowest_shard})",
        ]
        for s in summary.speed[:LINES]
    ]
    return section(
        "Speed of the harvest",
        scroll(svg.bars(rows, "tokens per second by rank")),
        table(["rank", "host", "shards", "median a shard", "slowest"], details),
    )


def _files(shard: ShardFacts | None) -> Markup:
    if shard is None:
        return Markup("")
    rows: list[list[str]] = [
        [f.name, f"{f.bytes:,}", f.state, tag("code", f.xxh3_128)] for f in shard.files[:LINES]
    ]
    more = len(shard.files) - len(rows)
    rest = tag("p", f"and {more} more files", class_="muted") if more else Markup("")
    return section(
        f"Files of shard {shard.shard}",
        table(["file", "bytes", "state", "XXH3-128"], rows),
        rest,
    )
