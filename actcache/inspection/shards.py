"""Facts from receipts: positions left out, non-finite and near-overflow rows, files of a shard."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from actcache.cache.folder import data_paths
from actcache.cache.reader import Cache
from actcache.filesystem.paths import CachePath
from actcache.format.receipts import ShardReceipt
from actcache.inspection.printable import printable

CLASSES = 20
"""Largest number of filters that are listed; the rest is summed up as 'others'."""
LISTED = 100
"""Largest number of listed shards with non-finite or near-overflow rows, the worst ones."""


@dataclass(frozen=True)
class Excluded:
    """Token positions that one filter left out."""

    name: str
    """Name of the filter in the receipts."""
    positions: int
    fraction: float
    """Share of all positions."""


@dataclass(frozen=True)
class BadShard:
    """One shard with non-finite or near-overflow rows."""

    shard: int
    rows: int
    non_finite: dict[str, int]
    """Rows with an infinity or NaN, by hookpoint; only counts above 0."""
    near_overflow: dict[str, int]
    """Finite rows near float16's overflow, by hookpoint; only counts above 0."""


@dataclass(frozen=True)
class BadRows:
    """Non-finite and near-overflow rows of all shards."""

    non_finite: int
    """Rows with an infinity or NaN, counted at every hookpoint."""
    near_overflow: int
    """Finite rows with an |x| of half of float16's largest or more, counted at every hookpoint."""
    shards: int
    """Number of shards with such a row."""
    worst: tuple[BadShard, ...]
    """Up to LISTED of these shards, those with the most rows first."""


@dataclass(frozen=True)
class ShardFile:
    """A file of a shard, as recorded in its receipt."""

    name: str
    bytes: int
    xxh3_128: str
    state: str
    """there, missing, no plain file, or its actual size. Its bytes are not read."""


@dataclass(frozen=True)
class ShardFacts:
    """Receipt of one shard, and the state of its files."""

    shard: int
    first_sequence: int
    """Number of its first sequence in the whole harvest."""
    sequences: int
    rows: int
    files: tuple[ShardFile, ...]


def excluded(receipts: Iterable[ShardReceipt], tokens: int) -> tuple[Excluded, ...]:
    """Count the positions left out by each filter, most first; zero counts are not listed.

    Args:
        receipts: receipts of the shards.
        tokens: number of positions in them.
    """
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt.dropped)
    common = [(name, count) for name, count in counts.most_common() if count]
    others = sum(count for _, count in common[CLASSES:])
    if others:
        common = [*common[:CLASSES], ("others", others)]
    return tuple(Excluded(printable(name, 40), n, n / max(tokens, 1)) for name, n in common)


def bad_rows(receipts: Iterable[ShardReceipt]) -> BadRows:
    """Count non-finite and near-overflow rows by shard."""
    found = []
    for receipt in receipts:
        non_finite = {name: count for name, count in receipt.non_finite.items() if count}
        near = {name: count for name, count in receipt.near_overflow.items() if count}
        if non_finite or near:
            found.append(BadShard(receipt.shard, receipt.rows, non_finite, near))
    worst = sorted(found, key=lambda a: (-_total(a.non_finite), -_total(a.near_overflow), a.shard))
    return BadRows(
        non_finite=sum(_total(a.non_finite) for a in found),
        near_overflow=sum(_total(a.near_overflow) for a in found),
        shards=len(found),
        worst=tuple(worst[:LISTED]),
    )


def shard_facts(cache: Cache, shard: int) -> ShardFacts:
    """Describe a published shard."""
    receipt = cache.receipts[shard]
    paths = data_paths(cache.root, cache.manifest, shard)
    files = [
        ShardFile(name, file.bytes, printable(file.xxh3_128, 32), _state(paths[name], file.bytes))
        for name, file in sorted(receipt.files.items())
    ]
    return ShardFacts(shard, receipt.first_sequence, receipt.sequences, receipt.rows, tuple(files))


def _state(path: CachePath, size: int) -> str:
    try:
        found = path.lstat()
    except OSError:
        return "missing"
    if not stat.S_ISREG(found.st_mode):
        return "no plain file"
    return "there" if found.st_size == size else f"{found.st_size} bytes"


def _total(counts: dict[str, int]) -> int:
    return sum(counts.values())
