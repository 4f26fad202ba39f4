"""How many rows a stream can hold in so many bytes. Pure functions: the order depends on them.

What a stream takes: the windows of all L lanes and a few spare ones, which are filled while the
others are emptied; batches on their way; and a little for reading, checking and decompressing.
"""

from __future__ import annotations

from dataclasses import dataclass

from actcache.errors import ConfigError
from actcache.format.manifest import Manifest
from actcache.storage import ROW_DTYPES
from actcache.stream.order import POOL_ROWS, default_lanes

DEFAULT_BYTES = 4 << 30
"""Unless said otherwise: about POOL_ROWS rows of one hookpoint of width 4,096 in bfloat16, and half
the memory of the smallest machine on which one would train from such rows."""

SCRATCH = 64 << 20
"""What reading takes besides: pieces of a few MiB to compare or decompress, for up to 4 threads."""

PREFETCH_BATCHES = 4
"""Batches that wait to be taken, if there is room."""

HELD_BATCHES = 3
"""More batches: one in the making, one kept back to know the last one, one in use."""

_PLACE = 24  # bytes for each row of a window: its address and its place in the permutation
_LEAST_BATCHES = 8  # of which half is for the pool: by default at least about 4 batches are mixed
_SPARE = 16


@dataclass(frozen=True)
class MemoryBudget:
    """How a stream's memory is spent."""

    pool_rows: int
    """Rows that windows hold over all lanes; part of the order."""
    prefetch: int
    """Batches that wait to be taken; not part of it."""


def extra_windows(lanes: int) -> int:
    """Windows that may be filled ahead while all lanes have theirs."""
    return max(1, lanes // _SPARE)


def plan_memory(
    buffer_bytes: int | None, manifest: Manifest, hookpoints: list[str], batch_size: int
) -> MemoryBudget:
    """What a number of bytes holds of some hookpoints' rows.

    Args:
        buffer_bytes: for all that the stream takes. None: DEFAULT_BYTES, or room for 8 batches if
            that is more, and POOL_ROWS rows at most.
        manifest: of the cache.
        hookpoints: that are streamed, together.
        batch_size: rows of a batch.

    Raises:
        ConfigError: they do not hold the rows of one batch besides the batches themselves.
    """
    row_dtype = ROW_DTYPES[manifest.identity.dtype]
    widths = [manifest.width(name) for name in hookpoints]
    row = sum(row_dtype.row_bytes(width) for width in widths)
    # 8-bit rows are decoded to float32, out of a batch of stored ones.
    decoded = sum(4 * width for width in widths) if row_dtype.decodes else 0
    batch = batch_size * (row + decoded + _PLACE)
    budget = buffer_bytes or max(DEFAULT_BYTES, SCRATCH + _LEAST_BATCHES * batch)
    prefetch = min(max(1, budget // 4 // batch - HELD_BATCHES), PREFETCH_BATCHES)
    lanes = default_lanes(batch_size)
    windows = lanes + extra_windows(lanes)
    fixed = SCRATCH + (prefetch + HELD_BATCHES) * batch
    window = max(0, budget - fixed) // (windows * (row + _PLACE))
    least = max(2, batch_size // lanes)  # one row is no window: see `sequential_batches`
    if window < least:
        needed = SCRATCH + (1 + HELD_BATCHES) * batch + windows * least * (row + _PLACE)
        raise ConfigError(
            "--buffer-bytes is too small for batches of these rows",
            expected=f">= {needed:,} ({batch_size:,} rows of {row:,} bytes a batch)",
            got=f"{budget:,}",
            remedy="more memory, a smaller --batch-size or fewer hookpoints at once",
        )
    pool = window * lanes
    return MemoryBudget(pool if buffer_bytes else min(pool, POOL_ROWS), prefetch)
