"""What receipts say: rows left out, rows with numbers that need care, and one shard as it lies."""

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
"""Classes of left-out rows that are told apart; the rest stands together as 'others'."""
LISTED = 100
"""Shards listed of those with non-finite or near-overflow rows, the worst ones."""


@dataclass(frozen=True)
class Excluded:
    """Token positions that one filter left out."""

    name: str
    """Of the filter, as receipts have it."""
    positions: int
    fraction: float
    """Of all positions."""


@dataclass(frozen=True)
class Afflicted:
    """One shard with rows that need care."""

    shard: int
    rows: int
    non_finite: dict[str, int]
    """Rows with an infinity or NaN, by hookpoint; those without are left out."""
    near_overflow: dict[str, int]
    """Finite rows near float16's overflow, by hookpoint; those without are left out."""


@dataclass(frozen=True)
class BadRows:
    """Rows that need care, over all shards."""

    non_finite: int
    """Rows with an infinity or NaN, counted once for each hookpoint that has one."""
    near_overflow: int
    """Finite rows with an |x| of half of float16's largest or more, counted likewise."""
    shards: int
    """Shards that hold any such row."""
    worst: tuple[Afflicted, ...]
    """Up to LISTED of them, that with the most first."""


@dataclass(frozen=True)
class ShardFile:
    """A file of a shard, as its receipt promises it."""

    name: str
    bytes: int
    xxh3_128: str
    state: str
    """there, missing, no plain file, or the size that it has instead. Its bytes are not read."""


@dataclass(frozen=True)
class ShardFacts:
    """One shard: what its receipt says, and whether its files are there."""

    shard: int
    first_sequence: int
    """Number, in the whole harvest, of its first sequence."""
    sequences: int
    rows: int
    files: tuple[ShardFile, ...]


def excluded(receipts: Iterable[ShardReceipt], tokens: int) -> tuple[Excluded, ...]:
    """Positions left out by each filter, most first; filters that left out none are not listed.

    Args:
        receipts: of the shards.
        tokens: positions in them.
    """
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt.dropped)
    common = [(name, count) for name, count in counts.most_common() if count]
    others = sum(count for _, count in common[CLASSES:])
    if others:
        common = [*common[:CLASSES], ("others", others)]
    return tuple(Excluded(printable(name, 40), n, n / max(tokens, 1)) for name, n in common)


def afflictions(receipts: Iterable[ShardReceipt]) -> BadRows:
    """Non-finite and near-overflow rows by shard."""
    found = []
    for receipt in receipts:
        non_finite = {name: count for name, count in receipt.non_finite.items() if count}
        near = {name: count for name, count in receipt.near_overflow.items() if count}
        if non_finite or near:
            found.append(Afflicted(receipt.shard, receipt.rows, non_finite, near))
    worst = sorted(found, key=lambda a: (-_total(a.non_finite), -_total(a.near_overflow), a.shard))
    return BadRows(
        non_finite=sum(_total(a.non_finite) for a in found),
        near_overflow=sum(_total(a.near_overflow) for a in found),
        shards=len(found),
        worst=tuple(worst[:LISTED]),
    )


def shard_facts(cache: Cache, shard: int) -> ShardFacts:
    """What a published shard is."""
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
