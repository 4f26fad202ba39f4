"""Text output of `actcache inspect`: short for a whole cache, detailed for selected parts."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence

from actcache.cache.sinks import as_lines
from actcache.format.statistics import NEAR_OVERFLOW
from actcache.inspection import CacheSummary, HookpointSummary, ShardFacts
from actcache.inspection.dimensions import OUTLIER
from actcache.inspection.facts import (
    bad_shard_table,
    cache_facts,
    dimension_table,
    file_table,
    format_number,
    hookpoint_columns,
    rank_table,
)
from actcache.inspection.norms import edge, span_of

from ..tables import table
from ..terminal_plots import fit, plot, shade, sparkline

FEW = 8
"""Largest number of hookpoints that are described one by one; more are summarised."""
ROWS = 40
"""Largest number of lines of a table without --verbose."""
SPARK = 16
"""Least number of columns of a norm histogram in the table."""
_LABEL = 9  # columns of the labels of facts


def print_summary(
    summary: CacheSummary,
    *,
    shard: ShardFacts | None = None,
    hookpoint: str | None = None,
    verbose: bool = False,
) -> None:
    """Print a summary.

    Args:
        summary: the facts.
        shard: the one shard that they describe, if it is one.
        hookpoint: print only this hookpoint, in detail.
        verbose: print all hookpoints, shards and ranks in detail.
    """
    width = shutil.get_terminal_size((100, 24)).columns
    chosen = [h for h in summary.hookpoints if hookpoint in (None, h.hookpoint)]
    few = verbose or len(chosen) <= FEW
    sections = [_facts(summary, shard, width, verbose), _hookpoints(chosen, width, verbose)]
    if hookpoint is not None or verbose:
        sections += [_detail(h, width) for h in chosen]
    elif few:
        sections.append(_outliers(chosen, width))
    named = [sinks for sinks in summary.sinks if hookpoint in (None, sinks.hookpoint)]
    sections.append(list(map(str, named)) if verbose else as_lines(named))
    if hookpoint is not None:
        sections.append(_similar(summary, hookpoint))
    elif verbose or 1 < len(chosen) <= FEW:
        sections.append(_cosines(summary, width))
    sections.append(_bad_rows(summary, verbose))
    if len(summary.speed) > 1:
        ranks = sorted(summary.speed, key=lambda s: s.tokens_per_second)
        shown = ranks if verbose else ranks[:FEW]
        more = len(ranks) - len(shown)
        sections.append(_lines(*rank_table(shown), more, "faster ranks: --verbose"))
    if shard is not None:
        first, last = shard.first_sequence, shard.first_sequence + shard.sequences - 1
        files = shard.files if verbose else shard.files[:ROWS]
        more = len(shard.files) - len(files)
        sections.append(
            [
                f"shard {shard.shard} holds sequences {first:,} to {last:,} of the harvest",
                *_lines(*file_table(files), more, "more files: --verbose"),
            ]
        )
    print("\n\n".join("\n".join(lines) for lines in sections if lines))


def _lines(
    header: Sequence[str], rows: Sequence[Sequence[str]], more: int = 0, what: str = ""
) -> list[str]:
    """Align a table; a last line counts the rows that are not shown."""
    return table(header, rows).splitlines() + ([f"and {more:,} {what}"] if more else [])


def _facts(summary: CacheSummary, shard: ShardFacts | None, width: int, verbose: bool) -> list[str]:
    facts = cache_facts(summary, shard)
    facts.pop("sinks", None)  # sentences of their own
    if not verbose and len(summary.hookpoints) > FEW:
        facts["means"] = _extreme_cosines(summary)
    lines = []
    for name, fact in facts.items():
        fact = re.sub(r"(\d) ([kMGTP]?B\b)", "\\1\xa0\\2", fact)  # no line break within a size
        wrapped = textwrap.wrap(
            fact,
            width,
            initial_indent=f"{name:<{_LABEL - 1}} ",
            subsequent_indent=" " * _LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [line.replace("\xa0", " ") for line in wrapped]
    return lines


def _hookpoints(chosen: Sequence[HookpointSummary], width: int, verbose: bool) -> list[str]:
    """Tabulate sizes, norms with a histogram on a common scale, and outlier dimensions."""
    shown = chosen if verbose else chosen[:ROWS]
    columns = hookpoint_columns(shown)
    columns["hookpoint"] = [fit(name, max(12, width // 4)) for name in columns["hookpoint"]]
    for name in ("non-finite", "near overflow"):
        if all(cell == "0" for cell in columns[name]):
            del columns[name]
    taken = {name: 2 + max(map(len, [name, *cells])) for name, cells in columns.items()}
    for name in ("bytes", "RMS norm", "width", "max |x|"):  # left out on a narrow terminal
        if width - sum(taken.values()) < SPARK:
            del columns[name], taken[name]
    room = min(48, max(SPARK, width - sum(taken.values())))
    low, high, sparks = _sparklines(shown, room)
    room = max(map(len, [*sparks, " " * SPARK]))
    ends = f"{low:.3g}", f"{high:.3g}" if high < 1000 else f"{high / 1000:.3g}k"
    title = ends[0] + "norms".center(room - len(ends[0]) - len(ends[1])) + ends[1]
    items = list(columns.items())
    items.insert(-1, (title, [spark.ljust(room) for spark in sparks]))
    rows = list(zip(*(cells for _, cells in items), strict=True))
    what = "more hookpoints: --verbose, or --hookpoint NAME"
    return _lines([name for name, _ in items], rows, len(chosen) - len(shown), what)


def _sparklines(shown: Sequence[HookpointSummary], columns: int) -> tuple[float, float, list[str]]:
    """Draw norm histograms on one axis from the smallest to the largest norm of all."""
    first, end = span_of([h.norms for h in shown])
    lines = []
    for h in shown:
        before = h.norms.first_bin - first if h.norms.counts else 0
        after = end - first - before - len(h.norms.counts)
        lines.append(sparkline([0] * before + list(h.norms.counts) + [0] * after, columns))
    return edge(first), edge(end), lines


def _outliers(chosen: Sequence[HookpointSummary], width: int) -> list[str]:
    """List the largest dimensions of each hookpoint on one line."""
    room = max(len(h.hookpoint) for h in chosen)
    count = max(1, min(5, (width - room) // 21))
    lines = [f"largest dimensions: RMS over the median's, share of variance (* from {OUTLIER:g}x)"]
    for h in chosen:
        cells = [
            f"{d.dimension}{'*' if d.outlier else ''} {d.ratio:.3g}x {d.variance_share:.1%}"
            for d in h.dimensions.largest[:count]
        ]
        lines.append(f"{h.hookpoint:<{room}}" + "".join(f"  {cell:<19}" for cell in cells).rstrip())
    return lines


def _detail(h: HookpointSummary, width: int) -> list[str]:
    """Describe one hookpoint: its complete histogram and its largest dimensions."""
    median, low, high = (format_number(h.norms.quantile(q)) for q in (0.5, 0.01, 0.99))
    return [
        f"{h.hookpoint}: norms of {h.rows - h.non_finite:,} finite rows, median {median}, "
        f"1% below {low}, 1% above {high}",
        *plot(h.norms.counts, h.norms.edges, min(width, 100)),
        "",
        *_lines(*dimension_table(h.dimensions.largest)),
        f"median dimension's RMS {format_number(h.dimensions.median_rms)}",
    ]


def _cosines(summary: CacheSummary, width: int) -> list[str]:
    """Print cosines between mean rows: as numbers if they fit, otherwise as shades."""
    matrix = summary.mean_cosines
    names = [h.hookpoint for h in summary.hookpoints[: len(matrix)]]
    title = "cosine of mean rows"
    numbers = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    room = max(map(len, numbers))
    if len(names) <= FEW and max(room, len(title)) + 7 * len(names) <= width:
        header = [title, *(f"({n + 1})" for n in range(len(names)))]
        cells = [["-" if c is None else f"{c:.2f}" for c in line] for line in matrix]
        return _lines(header, [[name, *line] for name, line in zip(numbers, cells, strict=True)])
    lines = [f"{title}: {shade(0.3)} from 0.2, {shade(0.5)} 0.4, {shade(0.7)} 0.6, {shade(1)} 0.8"]
    columns = max(1, (width - room - 2) // 2)
    if columns < len(names):
        lines[0] += f"; the first {columns} columns"
    lines += [
        f"{name:<{room}}  {''.join(shade(c) for c in line[:columns])}".rstrip()
        for name, line in zip(numbers, matrix, strict=True)
    ]
    return lines


def _extreme_cosines(summary: CacheSummary) -> str:
    """Describe the extremes of the matrix of cosines, and of neighbouring hookpoints."""
    names = [h.hookpoint for h in summary.hookpoints[: len(summary.mean_cosines)]]
    pairs = [
        (cosine, f"{names[i]} ~ {names[j]}", j == i + 1)
        for i, line in enumerate(summary.mean_cosines)
        for j, cosine in enumerate(line)
        if i < j and cosine is not None
    ]
    if not pairs:
        return "no two of one width"
    low, high = min(pairs), max(pairs)
    text = f"cosines from {low[0]:.2f} ({low[1]}) to {high[0]:.2f} ({high[1]})"
    if neighbours := [pair for pair in pairs if pair[2]]:
        text += f"; of neighbours at least {min(neighbours)[0]:.2f} ({min(neighbours)[1]})"
    return text


def _similar(summary: CacheSummary, hookpoint: str) -> list[str]:
    """List other hookpoints by the cosine of their means with this one's."""
    names = [h.hookpoint for h in summary.hookpoints[: len(summary.mean_cosines)]]
    if hookpoint not in names:
        return []
    line = zip(summary.mean_cosines[names.index(hookpoint)], names, strict=True)
    others = sorted(((c, n) for c, n in line if c is not None and n != hookpoint), reverse=True)
    if not others:
        return []
    shown = others if len(others) <= FEW else [*others[:4], *others[-2:]]
    return ["cosine of mean rows with"] + [f"  {name}  {cosine:.3f}" for cosine, name in shown]


def _bad_rows(summary: CacheSummary, verbose: bool) -> list[str]:
    """Tabulate the shards with non-finite or near-overflow rows."""
    found = summary.afflictions
    if not found.shards:
        return []
    shown = found.worst[: None if verbose else FEW]
    what = "more shards" + ("" if verbose else ": --verbose")
    rows = bad_shard_table(shown, lambda name: fit(name, 30))
    lines = _lines(*rows, found.shards - len(shown), what)
    if found.near_overflow:
        lines.append(
            f"near overflow: an |x| of {NEAR_OVERFLOW:,.0f} or more; float16 ends at 65,504"
        )
    return lines
