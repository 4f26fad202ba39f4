"""Attention sinks: the few rows of large norm that hold most of a hookpoint's variance.

Language models give the first token of a sequence, and BOS wherever it stands, rows of many times
the usual norm. The denominator of an FVU is then theirs. (Xiao et al. 2024, arXiv:2309.17453; Sun
et al. 2024, arXiv:2402.17762.)

The statistics of the shards show whether there can be such rows. Only then are rows read, from the
first on, as many as fit a budget. Letters: N rows, D width.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.cache.reader import Cache
from actcache.errors import ActcacheError
from actcache.format.statistics import BINS_PER_OCTAVE, FIRST_EXPONENT, Statistics, merge

RATIO = 10
"""Multiple of the median norm above which a row counts as a sink."""
LEAST_SHARE = 0.01
"""Share of the variance below which sinks are not reported."""
FEW = 8
"""Hookpoints that are described one by one."""
BUDGET = 256_000_000
"""Bytes of rows that are read, over all hookpoints, and as many of statistics."""
REMOTE_BUDGET = 16_000_000
"""The same for a cache at a URL."""
MOST_ROWS = 1 << 21
"""Rows of a hookpoint that are read at most, however narrow."""
_PIECE = 8_000_000  # bytes of rows read at once
_NAMED, _LISTED = 3, 20  # positions that are named in a sentence, and in all


@dataclass(frozen=True)
class SinkRows:
    """Rows of one hookpoint above `RATIO` median norms."""

    hookpoint: str
    sinks: int
    """Number of these rows."""
    at_first_position: int
    """Those that belong to the first token of their sequence."""
    variance_share: float
    """Their share of Σ‖x - mean‖² over the rows that were read."""
    rows_read: int
    """Finite rows that were read, from the first on."""
    rows: int
    """Rows of the shards."""
    skip_positions: int
    """Leading positions that the harvest left out."""
    positions: tuple[tuple[int, int], ...]
    """(position in the sequence, from 0; number of sinks there), the commonest 20."""

    def __str__(self) -> str:
        """Describe the rows in one sentence, with the options that leave them out."""
        part = "" if self.rows_read == self.rows else f"in the first {self.rows_read:,} rows, "
        rows, hold, them = "rows", "hold", "them"
        if self.sinks == 1:
            rows, hold, them = "row", "holds", "it"
        only_first = self.sinks == self.at_first_position and not self.skip_positions
        return (
            f"{part}{self.sinks:,} {rows} ({in_percent(self.sinks / self.rows_read)}) above "
            f"{RATIO} median norms {hold} {in_percent(self.variance_share)} of the variance of "
            f"{self.hookpoint} ({position_words(dict(self.positions), self.sinks)}): "
            f"--max-norm-ratio {RATIO} of saetrain fit leaves {them} out of training, of "
            f"actcache harvest {'(or its --skip-positions 1) ' * only_first}out of a new cache"
        )


def as_lines(found: Sequence[SinkRows]) -> list[str]:
    """Return a sentence for each of the worst hookpoints, and one that counts the others."""
    more = len(found) - FEW
    rest = [f"sinks at {more:,} more hookpoints: actcache inspect CACHE --json"] if more > 0 else []
    return [*map(str, found[:FEW]), *rest]


def in_percent(share: float) -> str:
    """Return a share as percent, with three digits."""
    return f"{100 * share:.3g}%"


def commonest(rows: Mapping[int, int]) -> list[int]:
    """Sort positions by the number of rows there, most first."""
    return sorted(rows, key=lambda position: (-rows[position], position))


def position_words(rows: Mapping[int, int], total: int) -> str:
    """Name the commonest positions of some rows: "5 at position 1, 1 at 37, 1 elsewhere".

    Args:
        rows: number of rows at each position, the commonest at least.
        total: number of all rows.
    """
    common = commonest(rows)[:_NAMED]
    words = [f"{rows[at]:,} at {'position ' * (at == common[0])}{at:,}" for at in common]
    if more := total - sum(rows[at] for at in common):
        words.append(f"{more:,} {'elsewhere' if common else 'at unknown positions'}")
    return ", ".join(words)


def find_sinks(
    cache: Cache,
    hookpoints: Sequence[str] | None = None,
    shards: Sequence[int] | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    left_out: Mapping[int, NDArray[np.int64]] | None = None,
) -> tuple[SinkRows, ...]:
    """Find the hookpoints whose sinks hold at least `LEAST_SHARE` of the variance.

    Files that are missing or damaged are left to the command's own checks: what was read before
    them counts. Rows are not compared with their checksums. No more than the budget is read,
    tokens of the shards concerned apart.

    Args:
        cache: an open cache.
        hookpoints: their names; None: all.
        shards: numbers of the shards; None: all.
        statistics: merged statistics of these shards, by hookpoint; None: they are read.
        left_out: rows of the shards that do not count, which `statistics` leave out too.

    Returns:
        The largest share first; nothing for a cache that was harvested without such rows.
    """
    identity = cache.manifest.identity
    if identity.max_norm_ratio is not None and identity.max_norm_ratio <= RATIO:
        return ()
    names = dict.fromkeys(cache.hookpoints if hookpoints is None else hookpoints)
    chosen = cache.shards if shards is None else shards
    budget = _budget(cache)
    if statistics is None:
        statistics = read_statistics(cache, [*names], chosen)
    suspects = [name for name in names if name in statistics and may_have_sinks(statistics[name])]

    positions = functools.cache(lambda shard: cache.tokens(shard).row_position)
    found = []
    for name in suspects:
        mean = statistics[name].mean
        read = _read_rows(cache, name, chosen, mean, budget // len(suspects), left_out or {})
        if (sinks := _sinks_among(read, positions)) is not None:
            where, share = sinks
            finite = sum(r.rows - r.non_finite[name] for r in map(cache.receipts.get, chosen) if r)
            found.append(
                SinkRows(
                    hookpoint=name,
                    sinks=where.total(),
                    at_first_position=where[0],
                    variance_share=share,
                    rows_read=len(read.norms),
                    rows=finite - sum(len((left_out or {}).get(shard, ())) for shard in chosen),
                    skip_positions=identity.skip_positions,
                    positions=tuple((at, where[at]) for at in commonest(where)[:_LISTED]),
                )
            )
    return tuple(sorted(found, key=lambda sinks: -sinks.variance_share))


def may_have_sinks(statistics: Statistics) -> bool:
    """Return False if no row can be above `RATIO` median norms, going by the norm histogram."""
    counts = np.clip(statistics.norm_histogram, 0, None)
    reached = np.flatnonzero(np.cumsum(counts) * 2 >= max(int(counts.sum()), 1))
    lowest = 2.0 ** ((reached[0] if len(reached) else 0) / BINS_PER_OCTAVE + FIRST_EXPONENT)
    # The first bin begins at zero. The statistics round norms otherwise than the exact sum does.
    return not len(reached) or reached[0] == 0 or statistics.norm_max > 0.999 * RATIO * lowest


@dataclass(frozen=True)
class _Rows:
    """Addresses, norms and deviations of the finite rows that were read."""

    shards: NDArray[np.int64]  # [N]
    numbers: NDArray[np.int64]  # of the row in its shard [N]
    norms: NDArray[np.float64]  # [N]
    deviations: NDArray[np.float64]  # ‖x - mean‖² [N]


def _read_rows(
    cache: Cache,
    name: str,
    shards: Sequence[int],
    mean: NDArray[np.float64],
    budget: int,
    left_out: Mapping[int, NDArray[np.int64]],
) -> _Rows:
    """Read rows of a hookpoint from the first on, up to a budget or a file that cannot be read."""
    parts = [_Rows(*(np.zeros(0, kind) for kind in (np.int64, np.int64, float, float)))]
    with suppress(ActcacheError, OSError), np.errstate(all="ignore"):
        for shard, start, count in _pieces(cache, name, shards, budget):
            stored = cache.read(name, shard, start, count)
            x = cache.row_dtype.to_float32(stored).astype(np.float64)
            norms = np.sqrt(np.einsum("nd,nd->n", x, x))
            x -= mean
            deviations = np.einsum("nd,nd->n", x, x)
            finite = np.flatnonzero(np.isfinite(norms) & np.isfinite(deviations))
            if shard in left_out:
                finite = finite[~np.isin(start + finite, left_out[shard])]
            of = np.full(len(finite), shard)
            parts.append(_Rows(of, start + finite, norms[finite], deviations[finite]))
    columns = ([getattr(part, f.name) for part in parts] for f in fields(_Rows))
    return _Rows(*map(np.concatenate, columns))


def _pieces(
    cache: Cache, name: str, shards: Sequence[int], budget: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (shard, first row, number of rows) in order, at least one row, up to the budget."""
    size = cache.row_dtype.row_bytes(cache.manifest.width(name))
    left, piece = min(MOST_ROWS, max(1, budget // size)), max(1, _PIECE // size)
    for shard in shards:
        rows = min(left, cache.receipts[shard].rows)
        for start in range(0, rows, piece):
            yield shard, start, min(piece, rows - start)
        left -= rows
        if not left:
            return


def _sinks_among(
    read: _Rows, positions: Callable[[int], NDArray[np.int32]]
) -> tuple[Counter[int], float] | None:
    """Return the number of sinks at each position, and their share of the variance."""
    if not len(read.norms):
        return None
    above = np.flatnonzero(read.norms > RATIO * np.median(read.norms))
    whole = float(read.deviations.sum())
    share = float(read.deviations[above].sum()) / whole if whole > 0 else 0.0
    if share < LEAST_SHARE:
        return None
    where = Counter[int]()
    for shard in np.unique(read.shards[above]):
        rows = read.numbers[above][read.shards[above] == shard]
        try:
            where.update(positions(int(shard))[rows].tolist())
        except (ActcacheError, OSError):
            return None
    return where, share


def _budget(cache: Cache) -> int:
    return BUDGET if isinstance(cache.root, Path) else REMOTE_BUDGET


def read_statistics(
    cache: Cache, names: Sequence[str], shards: Sequence[int]
) -> dict[str, Statistics]:
    """Merge the statistics of shards by hookpoint, from the first on, up to a budget of bytes.

    Files that are missing or damaged are left out.
    """
    merged: dict[str, Statistics] = {}
    budget = _budget(cache)
    for shard in shards:
        budget -= cache.receipts[shard].files["stats"].bytes
        if merged and budget < 0:
            break
        with suppress(ActcacheError, OSError):
            found = cache.shard_statistics(shard)
            for name in names:
                part = found[name]
                merged[name] = merge([merged[name], part]) if name in merged else part
    return merged
