"""Massive rows: the few rows of a very large norm that a reader may leave out of a cache.

Which rows are left out is a function of the cache and of one limit per hookpoint. A row whose norm
is above the limit at one hookpoint is left out at all of them, so that rows stay aligned. Only
shards whose statistics show a norm above a limit are read. A row that holds an infinity or NaN is
not left out for it: it stays an error of the reader.

Letters: N rows of a shard.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.cache.reader import Cache
from actcache.cache.sinks import in_percent, position_words
from actcache.cache.writer import row_norms
from actcache.errors import ActcacheError, ConfigError
from actcache.format.statistics import (
    BINS_PER_OCTAVE,
    FIRST_EXPONENT,
    Statistics,
    compute,
    merge,
)
from actcache.storage import StoredRows
from actcache.stream.order import Rows, RowsLeftOut, Span
from actcache.stream.verified_reads import VerifiedReader, Verify

MOST = 0.01
"""Largest share of the rows that may be left out: more are not a few rows of a large norm."""

_PIECE = 4096  # rows whose norms are computed at once
_ROUNDING = 0.999  # norms in the statistics are of float32 sums


def norm_limits(statistics: Mapping[str, Statistics], ratio: float) -> dict[str, float]:
    """Return the largest norm that is kept at each hookpoint: `ratio` times the median norm.

    The median is read off the norm histogram, within a quarter of an octave on a logarithmic scale
    (at most 9% from the true one): no row is read, and the result is the same on every machine. A
    hookpoint without a median above zero has no limit.

    Args:
        statistics: statistics of the rows, by hookpoint.
        ratio: largest accepted multiple of the median.
    """
    limits = {}
    for name, found in statistics.items():
        half, reached = found.norm_histogram.sum() / 2, found.norm_histogram.cumsum()
        bin_ = int(reached.searchsorted(half))
        if found.count and bin_:  # the first bin holds the norms of about zero
            share = 1 - float(reached[bin_] - half) / float(found.norm_histogram[bin_])
            limits[name] = ratio * 2.0 ** ((bin_ + share) / BINS_PER_OCTAVE + FIRST_EXPONENT)
    return limits


@dataclass(frozen=True)
class KeptRows:
    """What is left of the rows of some shards."""

    left_out: RowsLeftOut
    rows: int
    """Rows that are kept."""
    statistics: Mapping[str, Statistics]
    """Statistics of the kept rows, by hookpoint."""
    whole: Mapping[str, Statistics]
    """Statistics of all rows, by hookpoint."""

    @property
    def count(self) -> int:
        """Number of rows that are left out."""
        return sum(map(len, self.left_out.values()))

    def variance_share(self, hookpoint: str) -> float:
        """Return the share of Σ‖x - mean‖² that is gone without the rows that are left out."""
        whole, kept = self.whole[hookpoint], self.statistics[hookpoint]
        total = whole.variance * whole.count
        return 1 - kept.variance * kept.count / total if total > 0 else 0.0


def keep_rows(
    cache: Cache,
    hookpoints: Iterable[str],
    shards: Sequence[int],
    limits: Mapping[str, float],
    verify: Verify = "first-read",
) -> KeptRows:
    """Find the rows of shards whose norm is above a limit, and the statistics of the others.

    Args:
        cache: an open cache.
        hookpoints: hookpoints whose statistics are returned, those with a limit among them.
        shards: numbers of the shards.
        limits: largest norm that is kept, by hookpoint.
        verify: when files are compared with their receipts, see `VerifiedReader`.

    Raises:
        CorruptShardError: a file is missing, or differs from its receipt.
    """
    reader, names = VerifiedReader(cache, verify), [*hookpoints]
    left_out: dict[int, Rows] = {}
    whole: dict[str, Statistics] = {}
    kept: dict[str, Statistics] = {}
    cache.fetch_statistics(shards)
    for shard in shards:
        found = cache.shard_statistics(shard, names)
        suspect = [n for n, limit in limits.items() if found[n].norm_max > _ROUNDING * limit]
        above = np.zeros(cache.receipts[shard].rows, dtype=bool)  # [N]
        for name in suspect:
            above |= _above(cache, _load(cache, reader, name, shard), limits[name])
        for name, statistics in found.items():
            _add(whole, name, statistics)
            if above.any():
                rows = _load(cache, reader, name, shard)[np.flatnonzero(~above)]
                statistics = compute(rows, cache.row_dtype)
            _add(kept, name, statistics)
        if above.any():
            left_out[shard] = np.flatnonzero(above)
    stored = sum(cache.receipts[shard].rows for shard in shards)
    return KeptRows(left_out, stored - sum(map(len, left_out.values())), kept, whole)


def _add(merged: dict[str, Statistics], name: str, part: Statistics) -> None:
    merged[name] = merge([merged[name], part]) if name in merged else part


def _load(cache: Cache, reader: VerifiedReader, name: str, shard: int) -> StoredRows:
    """Read the rows of a shard at one hookpoint. [N]"""
    count = cache.receipts[shard].rows
    rows = cache.row_dtype.empty(count, cache.manifest.width(name))
    reader.load([Span(shard, 0, count)], {name: rows})
    return rows


def _above(cache: Cache, rows: StoredRows, limit: float) -> NDArray[np.bool_]:
    """Mark the finite rows whose norm is above a limit. [N]"""
    above = np.zeros(len(rows), dtype=bool)
    for start in range(0, len(rows), _PIECE):
        norms = row_norms(cache.row_dtype.to_float32(rows[start : start + _PIECE]))
        above[start : start + _PIECE] = np.isfinite(norms) & (norms > limit)
    return above


@dataclass(frozen=True)
class MassiveRows:
    """The rows that a run leaves out of its training and its held-out shards."""

    limits: dict[str, float]
    """Largest norm that is kept, by hookpoint."""
    training: KeptRows
    held_out: KeptRows

    @property
    def digest(self) -> str:
        """XXH3 128-bit digest of the addresses of all rows that are left out."""
        hasher = xxhash.xxh3_128()
        for part in (self.training, self.held_out):
            for shard, rows in sorted(part.left_out.items()):
                hasher.update(np.array([shard, len(rows), *rows.tolist()], dtype="<i8").tobytes())
        return hasher.hexdigest()

    def require_few(self, ratio: float) -> None:
        """Raise `ConfigError` if more than `MOST` of the training rows are left out."""
        part = self.training
        rows = part.rows + part.count
        if part.count > MOST * rows:
            raise ConfigError(
                f"--max-norm-ratio {ratio:g} would leave out more than a few rows",
                expected=f"at most {in_percent(MOST)} of the rows",
                got=f"{part.count:,} of {rows:,} ({in_percent(part.count / rows)})",
                remedy="a larger ratio, or 0 to keep all rows",
            )

    def describe(self, cache: Cache) -> str:
        """Describe the training rows that are left out in one sentence."""
        part = self.training
        rows = part.rows + part.count
        if not part.count:
            return f"leaves none of {rows:,} rows out"
        where = Counter[int]()
        with suppress(ActcacheError, OSError):  # of the tokens' files, which a run does not need
            for shard, numbers in part.left_out.items():
                where.update(cache.tokens(shard).row_position[numbers].tolist())
        shares = {name: part.variance_share(name) for name in part.whole}
        most = max(shares, key=lambda name: shares[name])
        return (
            f"leaves {part.count:,} of {rows:,} rows out ({position_words(where, part.count)}), "
            f"with {in_percent(shares[most])} of the variance of {most}"
        )


def find_massive_rows(
    cache: Cache,
    hookpoints: Iterable[str],
    training: Sequence[int],
    held_out: Sequence[int],
    limits: Mapping[str, float],
    verify: Verify = "first-read",
) -> MassiveRows:
    """Find the rows above a limit in training and held-out shards, see `keep_rows`."""
    names = [*hookpoints]
    return MassiveRows(
        dict(limits),
        keep_rows(cache, names, training, limits, verify),
        keep_rows(cache, names, held_out, limits, verify),
    )


def massive_rows(
    cache: Cache,
    hookpoints: Sequence[str],
    training: Sequence[int],
    held_out: Sequence[int],
    ratio: float,
    verify: Verify = "first-read",
) -> MassiveRows | None:
    """Find the rows above `ratio` times the median norm of the training rows.

    Returns:
        The rows; None if the ratio is 0, or no hookpoint has a limit.

    Raises:
        ConfigError: the ratio is out of range, or leaves out more than a few rows.
        CorruptShardError: a file is missing, or differs from its receipt.
    """
    if ratio and not 2 <= ratio < math.inf:
        raise ConfigError("--max-norm-ratio is out of range", expected="0, or >= 2", got=ratio)
    statistics = {name: cache.statistics(name, training) for name in hookpoints if ratio}
    limits = norm_limits(statistics, ratio)
    if not limits:
        return None
    found = find_massive_rows(cache, hookpoints, training, held_out, limits, verify)
    found.require_few(ratio)
    return found
