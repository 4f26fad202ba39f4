"""What `actcache inspect` prints: short for a whole cache, long for what was asked for by name."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..tables import table
from ..terminal_plots import fit
from .hookpoints import (
    FEW,
    ROWS,
    alike,
    cosines,
    detail,
    gist_of_cosines,
    hookpoint_table,
    outliers,
)

if TYPE_CHECKING:
    from actcache.inspection.harvest_speed import RankSpeed
    from actcache.inspection.shards import Afflicted, ShardFacts
    from actcache.inspection.summary import CacheSummary


_LABEL = 9  # columns of the names of facts


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
        shard: the one shard that they are of, if they are.
        hookpoint: tell all of this one, and nothing of the others.
        verbose: tell all of everything.
    """
    width = shutil.get_terminal_size((100, 24)).columns
    chosen = [h for h in summary.hookpoints if hookpoint in (None, h.hookpoint)]
    few = verbose or len(chosen) <= FEW
    sections = [_facts(summary, shard, width, verbose), hookpoint_table(chosen, width, verbose)]
    if hookpoint is not None or verbose:
        sections += [detail(h, width) for h in chosen]
    elif few:
        sections.append(outliers(chosen, width))
    if hookpoint is not None:
        sections.append(alike(summary, hookpoint))
    elif verbose or 1 < len(chosen) <= FEW:
        sections.append(cosines(summary, width))
    sections.append(_afflicted(summary, verbose))
    if len(summary.speed) > 1:
        sections.append(_speeds(summary.speed, verbose))
    if shard is not None:
        sections.append(_files(shard, verbose))
    print("\n\n".join("\n".join(lines) for lines in sections if lines))


def _facts(summary: CacheSummary, shard: ShardFacts | None, width: int, verbose: bool) -> list[str]:
    from actcache.core.progress import format_bytes

    part = f"{summary.shards} shards" if shard is None else f"shard {shard.shard}"
    size = f"{summary.tokens:,} tokens in {summary.sequences:,} sequences, {part}"
    dtype = summary.hookpoints[0].dtype
    facts = {
        "cache": f"{summary.cache}  (id {summary.cache_id})",
        "model": summary.model,
        "dataset": summary.dataset,
        "text": summary.text,
        "filters": summary.filters,
        "backend": summary.backend,
        "state": summary.state,
        "size": f"{size}; {summary.rows:,} rows in {dtype}, {format_bytes(summary.bytes)}",
        "left out": _left_out(summary),
        "numbers": _numbers(summary),
    }
    if summary.without_statistics:
        facts["missing"] = (
            f"the statistics of {summary.without_statistics} of {summary.shards} shards cannot be "
            "read: norms and dimensions are without them"
        )
    if summary.speed:
        facts["speed"] = _speed(summary.speed)
    if not verbose and len(summary.hookpoints) > FEW:
        facts["means"] = gist_of_cosines(summary)
    lines = []
    for name, fact in facts.items():
        fact = re.sub(r"(\d) ([kMGTP]?B\b)", "\\1\xa0\\2", fact)  # no line ends within a size
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


def _left_out(summary: CacheSummary) -> str:
    if not summary.excluded:
        return "no position"
    return ", ".join(f"{e.name} {e.fraction:.2%} ({e.positions:,})" for e in summary.excluded)


def _numbers(summary: CacheSummary) -> str:
    found = summary.afflictions
    if not found.shards:
        return "all finite, and none near float16's overflow"
    return (
        f"{found.non_finite:,} non-finite rows, {found.near_overflow:,} near float16's overflow, "
        f"in {found.shards:,} of {summary.shards:,} shards"
    )


def _speed(speed: Sequence[RankSpeed]) -> str:
    from actcache.core.progress import format_bytes

    tokens = [s.tokens_per_second for s in speed]
    rate = f"{sum(tokens):,.0f} tokens/s, {format_bytes(sum(s.bytes_per_second for s in speed))}/s"
    if len(speed) == 1:
        (s,) = speed
        return (
            f"{rate} on rank {s.rank} ({', '.join(s.hosts)}); {s.median_seconds:.3g} s a shard, "
            f"at most {s.slowest_seconds:.3g} (shard {s.slowest_shard})"
        )
    slowest = min(speed, key=lambda s: s.tokens_per_second)
    return f"{rate} on {len(speed)} ranks together; slowest: rank {slowest.rank}"


def _afflicted(summary: CacheSummary, verbose: bool) -> list[str]:
    """Shards with rows that need care."""
    from actcache.format.statistics import NEAR_OVERFLOW

    found = summary.afflictions
    if not found.shards:
        return []
    shown = found.worst[: None if verbose else FEW]
    rows = [
        [
            str(a.shard),
            f"{a.rows:,}",
            f"{sum(a.non_finite.values()):,}",
            f"{sum(a.near_overflow.values()):,}",
            _where(a),
        ]
        for a in shown
    ]
    lines = table(["shard", "rows", "non-finite", "near overflow", "where"], rows).splitlines()
    if len(shown) < found.shards:
        more = "" if verbose else ": --verbose"
        lines.append(f"and {found.shards - len(shown):,} more shards{more}")
    if found.near_overflow:
        lines.append(
            f"near overflow: an |x| of {NEAR_OVERFLOW:,.0f} or more; float16 ends at 65,504"
        )
    return lines


def _where(a: Afflicted) -> str:
    counts = {
        name: a.non_finite.get(name, 0) + a.near_overflow.get(name, 0)
        for name in {**a.non_finite, **a.near_overflow}
    }
    worst = sorted(counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{fit(name, 30)} {count:,}" for name, count in worst[:3])
    return shown + (f", {len(worst) - 3} more" if len(worst) > 3 else "")


def _speeds(speed: Sequence[RankSpeed], verbose: bool) -> list[str]:
    """One line for each rank, slowest first."""
    from actcache.core.progress import format_bytes

    ordered = sorted(speed, key=lambda s: s.tokens_per_second)
    shown = ordered if verbose else ordered[:FEW]
    rows = [
        [
            str(s.rank),
            f"{s.tokens_per_second:,.0f}",
            f"{format_bytes(s.bytes_per_second)}/s",
            str(s.shards),
            f"{s.median_seconds:.3g}",
            f"{s.slowest_seconds:.3g} (shard {s.slowest_shard})",
            ", ".join(s.hosts),
        ]
        for s in shown
    ]
    header = ["rank", "tokens/s", "bytes/s", "shards", "s/shard", "slowest", "host"]
    lines = table(header, rows).splitlines()
    if len(shown) < len(ordered):
        lines.append(f"and {len(ordered) - len(shown)} faster ranks: --verbose")
    return lines


def _files(shard: ShardFacts, verbose: bool) -> list[str]:
    """The files of one shard."""
    shown = shard.files if verbose else shard.files[:ROWS]
    rows: Iterable[list[str]] = [
        [file.name, f"{file.bytes:,}", file.state, file.xxh3_128] for file in shown
    ]
    first, last = shard.first_sequence, shard.first_sequence + shard.sequences - 1
    lines = [f"shard {shard.shard} holds sequences {first:,} to {last:,} of the harvest"]
    lines += table(["file", "bytes", "state", "XXH3-128"], list(rows)).splitlines()
    if len(shown) < len(shard.files):
        lines.append(f"and {len(shard.files) - len(shown)} more files: --verbose")
    return lines
