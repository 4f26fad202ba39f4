"""A short look at the disk before a stream begins: how many threads read it best.

What is found cannot touch the order of rows, see `read_ahead`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from actcache.order import Epoch, OrderPlan, Span
from actcache.reader import Cache

THREADS = (2, 4)
DEFAULT_THREADS = 2

_ROUND = 16 << 20  # bytes that each number of threads reads
_ENOUGH = 1.1  # more threads must be so much faster: they take time from training


@dataclass(frozen=True)
class Tuning:
    """How a stream reads."""

    threads: int
    bytes_per_second: float | None
    """At which the probe read with these; None where the cache is too small to tell."""


def tune(cache: Cache, hookpoints: Sequence[str], plan: OrderPlan, epoch: int = 0) -> Tuning:
    """Read the first blocks of an epoch with two and with four threads, each block once.

    Takes 32 MiB, which training reads soon after; nothing where that is more than 1/8 of the rows.

    Raises:
        CorruptShardError: a file is gone, or is not what its receipt promises.
    """
    row_bytes = sum(cache.codec.row_bytes(cache.manifest.width(name)) for name in hookpoints)
    blocks = max(THREADS[-1], _ROUND // (row_bytes * plan.block_rows))
    if 8 * len(THREADS) * blocks * plan.block_rows > plan.rows:
        return Tuning(DEFAULT_THREADS, None)
    spans = Epoch(plan, epoch).spans(0, plan.rows)
    found: Tuning | None = None
    for threads in THREADS:
        speed = _speed(cache, hookpoints, list(islice(spans, blocks)), threads) * row_bytes
        best = found.bytes_per_second if found is not None else None
        if best is None or speed > _ENOUGH * best:
            found = Tuning(threads, speed)
    assert found is not None
    return found


def _speed(cache: Cache, hookpoints: Sequence[str], spans: Sequence[Span], threads: int) -> float:
    """Rows per second."""

    def read(mine: Sequence[Span]) -> None:
        rows = max(span.rows for span in mine)
        memory = {name: cache.codec.empty(rows, cache.manifest.width(name)) for name in hookpoints}
        for span in mine:
            for name, out in memory.items():
                cache.read_into(name, span.shard, span.start, out[: span.rows])

    with ThreadPoolExecutor(threads, "actcache-probe") as pool:
        began = time.perf_counter()
        shares = [spans[i::threads] for i in range(threads)]
        for future in [pool.submit(read, share) for share in shares if share]:
            future.result()
        return sum(span.rows for span in spans) / max(time.perf_counter() - began, 1e-9)
