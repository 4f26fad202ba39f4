"""A short look at the disk before a stream begins: how is it best read?

What is found cannot touch the order of rows, see `read_ahead`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from actcache.cache.reader import Cache
from actcache.storage.preadv import WHOLE
from actcache.stream.order import Epoch, OrderPlan, Span
from actcache.stream.verified_reads import ReadSettings, VerifiedReader

CHANGES: tuple[dict[str, Any], ...] = ({"threads": 4}, {"piece": WHOLE}, {"ahead": True})
"""What is tried after the default, one upon the other where it helps."""
REMOTE = ReadSettings(threads=8, max_read_bytes=WHOLE)
"""From a store: what threads wait for is the way there, not this machine."""

_ROUND = 16 << 20  # bytes that each way reads
_ENOUGH = 1.1  # what takes more from the machine must be so much faster


@dataclass(frozen=True)
class ProbeResult:
    """How a stream reads."""

    reading: ReadSettings
    bytes_per_second: float | None
    """At which the probe read so; None where there was none."""
    why_not: str = "too little to probe"
    """Said where there was none."""


def probe_read_settings(
    cache: Cache, hookpoints: Sequence[str], plan: OrderPlan, epoch: int = 0
) -> ProbeResult:
    """Read the first blocks of an epoch in several ways, each block once.

    With two threads and with four, then in whole blocks, then announced ahead. Takes 64 MiB, which
    training reads soon after; nothing where that is more than 1/8 of the rows, or where there is
    nothing to read.

    Raises:
        CorruptShardError: a file is gone, or is not what its receipt promises.
    """
    if not isinstance(cache.root, Path):
        return ProbeResult(REMOTE, None, "from a store")
    if not hookpoints:
        return ProbeResult(ReadSettings(), None)
    row_bytes = sum(cache.row_dtype.row_bytes(cache.manifest.width(name)) for name in hookpoints)
    blocks = max(4, _ROUND // (row_bytes * plan.block_rows))
    if 8 * (1 + len(CHANGES)) * blocks * plan.block_rows > plan.rows:
        return ProbeResult(ReadSettings(), None)
    spans = Epoch(plan, epoch).spans(0, plan.rows)

    def speed_of(reading: ReadSettings) -> float:
        return _speed(cache, hookpoints, list(islice(spans, blocks)), reading) * row_bytes

    best = ReadSettings()
    speed = speed_of(best)
    for change in CHANGES:
        trial = replace(best, **change)
        found = speed_of(trial)
        if found > _ENOUGH * speed:
            best, speed = trial, found
    return ProbeResult(best, speed)


def _speed(
    cache: Cache, hookpoints: Sequence[str], spans: Sequence[Span], reading: ReadSettings
) -> float:
    """Rows per second."""
    reads = VerifiedReader(cache, "never", reading)

    def read(mine: Sequence[Span]) -> None:
        rows = max(span.rows for span in mine)
        memory = {
            name: cache.row_dtype.empty(rows, cache.manifest.width(name)) for name in hookpoints
        }
        for number, span in enumerate(mine):
            reads.readahead(mine[number + 1 : number + 2], hookpoints)
            reads.load([span], {name: out[: span.rows] for name, out in memory.items()})

    with ThreadPoolExecutor(reading.threads, "actcache-probe") as pool:
        began = time.perf_counter()
        shares = [spans[i :: reading.threads] for i in range(reading.threads)]
        for future in [pool.submit(read, share) for share in shares if share]:
            future.result()
        return sum(span.rows for span in spans) / max(time.perf_counter() - began, 1e-9)
