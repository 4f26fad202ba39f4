"""Speed of the harvest, read from `logs/`, which is outside the cache's format and untrusted.

A log may be missing, truncated, or hold arbitrary bytes. Valid entries are counted, invalid lines
are counted as `unread`, and no error is raised.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from actcache.errors import FormatError
from actcache.filesystem.paths import CachePath
from actcache.filesystem.rooted import open_file
from actcache.format.receipts import ShardReceipt
from actcache.inspection.printable import printable
from actcache.storage.preadv import read_exactly

FOLDER = "logs"
RANKS = 4096
"""Largest number of logs that are read, those of the lowest ranks."""
TAIL = 1 << 20
"""Bytes read from the end of each log: about 8,000 shards."""
_NAME = re.compile(r"harvest-rank([0-9]{1,6})\.jsonl")
_LINE = 4096  # largest number of bytes of a line
_SECONDS = 1e9  # larger values are invalid: 30 years for a shard


@dataclass(frozen=True)
class RankSpeed:
    """Speed of one rank over all its runs, as far as its log has entries."""

    rank: int
    hosts: tuple[str, ...]
    """Host names, the first three."""
    shards: int
    """Number of published shards that the cache has; a shard made twice counts twice."""
    seconds: float
    """Time spent on them, without loading the model."""
    tokens_per_second: float
    bytes_per_second: float
    median_seconds: float
    """Median time of a shard."""
    slowest_seconds: float
    """Longest time of a shard."""
    slowest_shard: int
    unread: int
    """Number of invalid lines in the log."""


@dataclass(frozen=True)
class _Entry:
    shard: int
    seconds: float
    host: str


def speed_by_rank(
    root: CachePath, receipts: Mapping[int, ShardReceipt], ctx_len: int
) -> tuple[RankSpeed, ...]:
    """Compute the speed of every rank whose log has an entry for one of these shards.

    Args:
        root: folder of the cache.
        receipts: receipts of the chosen shards.
        ctx_len: tokens of a sequence.
    """
    found = (_rank_speed(rank, path, receipts, ctx_len) for rank, path in _logs(root))
    return tuple(speed for speed in found if speed is not None)


def _rank_speed(
    rank: int, path: CachePath, receipts: Mapping[int, ShardReceipt], ctx_len: int
) -> RankSpeed | None:
    read = [_entry(line) for line in _lines(path)]
    entries = [e for e in read if e is not None and e.shard in receipts]
    seconds = sum(e.seconds for e in entries)
    if not entries or not seconds:
        return None
    # Bytes and tokens come from the receipts, which are verified, and not from the log.
    made = [receipts[e.shard] for e in entries]
    slowest = max(entries, key=lambda e: e.seconds)
    return RankSpeed(
        rank=rank,
        hosts=tuple(dict.fromkeys(e.host for e in entries))[:3],
        shards=len(entries),
        seconds=seconds,
        tokens_per_second=sum(r.sequences for r in made) * ctx_len / seconds,
        bytes_per_second=sum(f.bytes for r in made for f in r.files.values()) / seconds,
        median_seconds=statistics.median(e.seconds for e in entries),
        slowest_seconds=slowest.seconds,
        slowest_shard=slowest.shard,
        unread=read.count(None),
    )


def _logs(root: CachePath) -> list[tuple[int, CachePath]]:
    folder = root / FOLDER
    try:
        names = [path.name for path in folder.iterdir()]
    except (OSError, FormatError):  # absent, or a link
        return []
    ranks = sorted((int(m[1]), name) for name in names if (m := _NAME.fullmatch(name)))
    return [(rank, folder / name) for rank, name in ranks[:RANKS]]


def _lines(path: CachePath) -> Iterator[bytes]:
    """Yield the last complete lines of a log; none if it is not a regular file."""
    if not isinstance(path, Path):
        size = path.stat().st_size if path.is_file() else 0
        end = bytearray(min(TAIL, max(0, size)))
        read_exactly(path, memoryview(end), size - len(end))
        yield from _complete_lines(bytes(end), cut=size > TAIL)
        return
    try:
        fd = open_file(path)
    except (OSError, FormatError):
        return
    try:
        begin = max(0, os.fstat(fd).st_size - TAIL)
        tail = os.pread(fd, TAIL, begin)
    finally:
        os.close(fd)
    yield from _complete_lines(tail, cut=begin > 0)


def _complete_lines(tail: bytes, *, cut: bool) -> Iterator[bytes]:
    yield from (line for line in tail.split(b"\n")[1 if cut else 0 :] if line.strip())


def _entry(line: bytes) -> _Entry | None:
    """Parse one line of a log; None if it is invalid."""
    if len(line) > _LINE:
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    shard, seconds, host = found.get("shard"), found.get("seconds"), found.get("host")
    if type(shard) is not int or not isinstance(host, str):
        return None
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        return None
    if not 0 <= seconds < _SECONDS:  # NaN is not
        return None
    return _Entry(shard, float(seconds), printable(host, 64))
