"""Facts of an inspection as text: (label, value) pairs and tables of cells.

The terminal and the HTML page both render these, so that each number is formatted in one place. A
table is (header, rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from actcache.cache.sinks import as_lines
from actcache.core.progress import format_bytes
from actcache.inspection.dimensions import Dimension
from actcache.inspection.harvest_speed import RankSpeed
from actcache.inspection.shards import BadShard, ShardFacts, ShardFile
from actcache.inspection.summary import CacheSummary, HookpointSummary

Table = tuple[list[str], list[list[str]]]


def format_number(value: float, digits: int = 4) -> str:
    """Format with a few digits, and without an exponent as long as that is readable."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.{digits}g}"


def cache_facts(summary: CacheSummary, shard: ShardFacts | None) -> dict[str, str]:
    """Describe a cache by label, or the one shard that the summary is of."""
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
        "left out": ", ".join(
            f"{e.name} {e.fraction:.2%} ({e.positions:,})" for e in summary.excluded
        )
        or "no position",
        "numbers": _numbers(summary),
    }
    if summary.left_out:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in summary.left_out.items())
        facts["documents"] = f"{sum(summary.left_out.values()):,} left out: {reasons}"
    if summary.sinks:
        facts["sinks"] = "; ".join(as_lines(summary.sinks))
    if summary.without_statistics:
        facts["missing"] = (
            f"the statistics of {summary.without_statistics} of {summary.shards} shards cannot be "
            "read: norms and dimensions are without them"
        )
    if summary.speed:
        facts["speed"] = _speed(summary.speed)
    return facts


def _numbers(summary: CacheSummary) -> str:
    found = summary.afflictions
    if not found.shards:
        return "all finite, and none near float16's overflow"
    return (
        f"{found.non_finite:,} non-finite rows, {found.near_overflow:,} near float16's overflow, "
        f"in {found.shards:,} of {summary.shards:,} shards"
    )


def _speed(ranks: Sequence[RankSpeed]) -> str:
    tokens = sum(rank.tokens_per_second for rank in ranks)
    size = format_bytes(sum(rank.bytes_per_second for rank in ranks))
    slowest = min(ranks, key=lambda rank: rank.tokens_per_second)
    if len(ranks) > 1:
        where = f"on {len(ranks)} ranks together; slowest: rank {slowest.rank}"
    else:
        where = (
            f"on rank {slowest.rank} ({', '.join(slowest.hosts)}); "
            f"{slowest.median_seconds:.3g} s a shard, "
            f"at most {slowest.slowest_seconds:.3g} (shard {slowest.slowest_shard})"
        )
    return f"{tokens:,.0f} tokens/s, {size}/s {where}"


def hookpoint_columns(hookpoints: Sequence[HookpointSummary]) -> dict[str, list[str]]:
    """Tabulate sizes, norms and counts of hookpoints: cells by header."""
    return {
        "hookpoint": [h.hookpoint for h in hookpoints],
        "width": [str(h.width) for h in hookpoints],
        "bytes": [format_bytes(h.bytes) for h in hookpoints],
        "mean norm": [format_number(h.mean_norm) for h in hookpoints],
        "RMS norm": [format_number(h.rms_norm) for h in hookpoints],
        "max norm": [format_number(h.max_norm) for h in hookpoints],
        "max |x|": [format_number(h.abs_max) for h in hookpoints],
        "non-finite": [f"{h.non_finite:,}" for h in hookpoints],
        "near overflow": [f"{h.near_overflow:,}" for h in hookpoints],
        "outlier dims": [_outliers(h) for h in hookpoints],
    }


def _outliers(h: HookpointSummary) -> str:
    dimensions = h.dimensions
    if not dimensions.outliers:
        return "none"
    top = next((d for d in dimensions.largest if d.outlier), dimensions.largest[0])
    return f"{dimensions.outliers} ({top.dimension}: {top.ratio:.0f}x)"


def dimension_table(dimensions: Iterable[Dimension]) -> Table:
    """Tabulate dimensions of a hookpoint."""
    header = ["dimension", "RMS", "over median", "mean", "max |x|", "variance", "outlier"]
    return header, [
        [
            str(d.dimension),
            format_number(d.rms),
            f"{d.ratio:.3g}x",
            format_number(d.mean),
            format_number(d.abs_max),
            f"{d.variance_share:.2%}",
            "yes" if d.outlier else "",
        ]
        for d in dimensions
    ]


def bad_shard_table(shards: Iterable[BadShard], shorten: Callable[[str], str]) -> Table:
    """Tabulate shards with non-finite or near-overflow rows, and their worst hookpoints.

    Args:
        shards: the shards.
        shorten: abbreviates the name of a hookpoint.
    """
    rows = []
    for s in shards:
        counts = {
            name: s.non_finite.get(name, 0) + s.near_overflow.get(name, 0)
            for name in {**s.non_finite, **s.near_overflow}
        }
        worst = sorted(counts.items(), key=lambda item: -item[1])
        where = ", ".join(f"{shorten(name)} {count:,}" for name, count in worst[:3])
        where += f", {len(worst) - 3} more" if len(worst) > 3 else ""
        totals = [f"{sum(n.values()):,}" for n in (s.non_finite, s.near_overflow)]
        rows.append([str(s.shard), f"{s.rows:,}", *totals, where])
    return ["shard", "rows", "non-finite", "near overflow", "where"], rows


def rank_table(ranks: Iterable[RankSpeed]) -> Table:
    """Tabulate the harvest speed of ranks."""
    return ["rank", "tokens/s", "bytes/s", "shards", "s/shard", "slowest", "host"], [
        [
            str(rank.rank),
            f"{rank.tokens_per_second:,.0f}",
            f"{format_bytes(rank.bytes_per_second)}/s",
            str(rank.shards),
            f"{rank.median_seconds:.3g}",
            f"{rank.slowest_seconds:.3g} (shard {rank.slowest_shard})",
            ", ".join(rank.hosts),
        ]
        for rank in ranks
    ]


def file_table(files: Iterable[ShardFile]) -> Table:
    """Tabulate the files of a shard."""
    rows = [[file.name, f"{file.bytes:,}", file.state, file.xxh3_128] for file in files]
    return ["file", "bytes", "state", "XXH3-128"], rows
