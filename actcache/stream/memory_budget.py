"""Memory of a stream: number of rows that a budget of bytes holds. Pure functions.

The order of rows depends on the result. A stream needs memory for the windows of all L lanes and a
few spare ones, which are filled while the others are read; for queued batches; and for buffers to
read, compare and decompress files.
"""

from __future__ import annotations

from dataclasses import dataclass

from actcache.errors import ConfigError
from actcache.format.manifest import Manifest
from actcache.storage import ROW_DTYPES
from actcache.stream.order import POOL_ROWS, default_lanes

DEFAULT_BYTES = 4 << 30
"""Default budget: about POOL_ROWS rows of one hookpoint of width 4,096 in bfloat16, and half the
memory of the smallest machine on which one would train from such rows."""

SCRATCH = 64 << 20
"""Memory of read buffers: a few MiB to compare or decompress, for up to 4 threads."""

PREFETCH_BATCHES = 4
"""Largest number of batches that are queued."""

HELD_BATCHES = 3
"""Batches beside the queued ones: one being built, one delayed to mark the last, one in use."""

_ROW_OVERHEAD = 24  # bytes for each row of a window: its address and its index in the permutation
_LEAST_BATCHES = 8  # half of it for the windows: by default at least about 4 batches are mixed
_SPARE = 16


@dataclass(frozen=True)
class MemoryBudget:
    """Division of a stream's memory."""

    pool_rows: int
    """Rows that the windows of all lanes hold; the order depends on it."""
    prefetch: int
    """Batches that are queued; the order does not depend on it."""


def extra_windows(lanes: int) -> int:
    """Return the number of spare windows, which are filled while every lane has its own."""
    return max(1, lanes // _SPARE)


def plan_memory(
    buffer_bytes: int | None,
    manifest: Manifest,
    hookpoints: list[str],
    batch_size: int,
    pool_rows: int | None = None,
) -> MemoryBudget:
    """Divide a budget of bytes between windows and queued batches.

    Args:
        buffer_bytes: memory of the whole stream. None: DEFAULT_BYTES, or 8 batches if that is more,
            and at most POOL_ROWS rows.
        manifest: manifest of the cache.
        hookpoints: hookpoints that are streamed together.
        batch_size: rows of a batch.
        pool_rows: rows of the windows, if they are given instead of bytes.

    Raises:
        ConfigError: the budget does not hold the rows of one batch beside the queued batches.
    """
    if pool_rows is not None:
        return MemoryBudget(pool_rows, PREFETCH_BATCHES)
    row_dtype = ROW_DTYPES[manifest.identity.dtype]
    widths = [manifest.width(name) for name in hookpoints]
    row = sum(map(row_dtype.row_bytes, widths))
    # 8-bit rows are decoded to float32, in addition to the batch of stored rows.
    decoded = sum(4 * width for width in widths) if row_dtype.decodes else 0
    batch = batch_size * (row + decoded + _ROW_OVERHEAD)
    budget = buffer_bytes or max(DEFAULT_BYTES, SCRATCH + _LEAST_BATCHES * batch)
    prefetch = min(max(1, budget // 4 // batch - HELD_BATCHES), PREFETCH_BATCHES)
    lanes = default_lanes(batch_size)
    windows = lanes + extra_windows(lanes)
    fixed = SCRATCH + (prefetch + HELD_BATCHES) * batch
    window = max(0, budget - fixed) // (windows * (row + _ROW_OVERHEAD))
    least = max(2, batch_size // lanes)  # a window of one row does not shuffle
    if window < least:
        needed = SCRATCH + (1 + HELD_BATCHES) * batch + windows * least * (row + _ROW_OVERHEAD)
        raise ConfigError(
            "--buffer-bytes is too small for batches of these rows",
            expected=f">= {needed:,} ({batch_size:,} rows of {row:,} bytes a batch)",
            got=f"{budget:,}",
            remedy="more memory, a smaller --batch-size or fewer hookpoints at once",
        )
    pool = window * lanes
    return MemoryBudget(pool if buffer_bytes else min(pool, POOL_ROWS), prefetch)
