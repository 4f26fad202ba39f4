"""How fast this machine reads a cache, and makes batches of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from actcache.cache.reader import Cache
from actcache.errors import EmptyCacheError
from actcache.filesystem.paths import CachePath, require_remote
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.order import POOL_ROWS, make_plan
from actcache.stream.read_tuning import probe_read_settings
from actcache.stream.verified_reads import ReadSettings

_PIECE = 4 << 20


@dataclass(frozen=True)
class Speed:
    """One way of reading."""

    what: str
    bytes_per_second: float
    rows_per_second: float


@dataclass(frozen=True)
class Speeds:
    """What `benchmark_reads` found."""

    hookpoints: tuple[str, ...]
    rows: int
    """That were read, each way."""
    bytes: int
    """That they take on disk."""
    reading: ReadSettings
    """How."""
    batch_size: int
    pool_rows: int
    """Mixed in memory, where rows are mixed."""
    speeds: tuple[Speed, ...]


def benchmark_reads(
    cache: Cache,
    hookpoints: Sequence[str] = (),
    *,
    max_bytes: int = 1 << 30,
    batch_size: int = 4096,
    threads: int | None = None,
) -> Speeds:
    """Read some shards front to back, and stream them, out of the disk's hands and the page cache.

    Their pages are let go before each reading from the disk, as far as the system does so; a disk
    may have memory of its own. With a store, blocks that this machine keeps are let go instead.

    Args:
        cache: the cache.
        hookpoints: to read together; all by default.
        max_bytes: of shards to read, at least one shard.
        batch_size: rows of a batch; fewer if the shards have fewer.
        threads: that read; by default all of how to read is found by a probe.

    Raises:
        EmptyCacheError: there is no complete shard, or no row.
        HookpointError: the cache does not hold a hookpoint.
        CorruptShardError: a file is gone, or has another size or header.
    """
    cache.require_shards()
    names = tuple(hookpoints) or tuple(cache.hookpoints)
    for name in names:
        cache.require_hookpoint(name)
    row_bytes = sum(cache.row_dtype.row_bytes(cache.manifest.width(name)) for name in names)
    shards: list[tuple[int, int]] = []
    for shard, receipt in cache.receipts.items():
        rows = sum(n for _, n in shards)
        if rows and (rows + receipt.rows) * row_bytes > max_bytes:
            break
        shards.append((shard, receipt.rows))
    rows = sum(n for _, n in shards)
    if not rows:
        raise EmptyCacheError(f"{cache.root} has no rows", remedy="harvest with other filters")
    files = [p for s, _ in shards for name in names for p in cache.files_of(name, s).values()]
    batch_size = min(batch_size, rows)
    pool_rows = max(2, min(POOL_ROWS, rows // 8))
    reading = (
        ReadSettings(threads) if threads is not None else _tuned(cache, names, shards, batch_size)
    )

    def stream(pool: int) -> int:
        plan = make_plan(shards, cache.manifest.block_rows, batch_size, 0, pool)
        with ActivationStream(cache, names, plan, verify="never", reading=reading) as batches:
            for _ in range(plan.steps_per_epoch):
                next(batches)
        return plan.steps_per_epoch * batch_size

    def read() -> int:
        _read_all(files, reading.threads)
        return rows

    ways: list[tuple[str, Callable[[], int]]] = [
        ("files, front to back", read),
        ("batches in order", lambda: stream(1)),
        ("batches mixed", lambda: stream(pool_rows)),
    ]
    found = []
    local = isinstance(cache.root, Path)
    for way, act in ways:
        _drop_page_cache(files)
        for state in ("disk", "memory") if local else ("the store", "kept blocks"):
            began = time.perf_counter()
            speed = act() / max(time.perf_counter() - began, 1e-9)
            found.append(Speed(f"{way}, from {state}", speed * row_bytes, speed))
    return Speeds(names, rows, rows * row_bytes, reading, batch_size, pool_rows, tuple(found))


def _tuned(
    cache: Cache, names: Sequence[str], shards: list[tuple[int, int]], batch_size: int
) -> ReadSettings:
    return probe_read_settings(
        cache, names, make_plan(shards, cache.manifest.block_rows, batch_size, 0)
    ).reading


def _drop_page_cache(files: Sequence[CachePath]) -> None:
    """Ask the system to forget what it holds of some files."""
    for path in files:
        if not isinstance(path, Path):
            require_remote(path).forget()
            continue
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _read_all(files: Sequence[CachePath], threads: int) -> None:
    def read(mine: Sequence[CachePath]) -> None:
        memory = memoryview(bytearray(_PIECE))
        for path in mine:
            if not isinstance(path, Path):
                require_remote(path).warm()
                continue
            with path.open("rb", buffering=0) as file:
                while file.readinto(memory):
                    pass

    with ThreadPoolExecutor(threads, "actcache-bench") as pool:
        for future in [pool.submit(read, files[i::threads]) for i in range(threads)]:
            future.result()
