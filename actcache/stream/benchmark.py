"""Benchmark: speed at which this machine reads a cache and builds batches from it."""

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
from actcache.filesystem.rooted import open_file
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.order import POOL_ROWS, OrderPlan, make_plan
from actcache.stream.verified_reads import ReadSettings, probe_read_settings

_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Speed:
    """Speed of one way of reading."""

    what: str
    bytes_per_second: float
    rows_per_second: float


@dataclass(frozen=True)
class Speeds:
    """Results of `benchmark_reads`. Fields are the keys of `actcache bench --json`."""

    hookpoints: tuple[str, ...]
    rows: int
    """Rows that were read in each way."""
    bytes: int
    """Bytes of these rows on disk."""
    reading: ReadSettings
    """Settings that they were read with."""
    batch_size: int
    pool_rows: int
    """Rows of the shuffle buffer, for shuffled batches."""
    speeds: tuple[Speed, ...]


def benchmark_reads(
    cache: Cache,
    hookpoints: Sequence[str] = (),
    *,
    max_bytes: int = 1 << 30,
    batch_size: int = 4096,
    threads: int | None = None,
) -> Speeds:
    """Read some shards front to back, and stream them, each from the disk and from the page cache.

    Before each read from the disk, their pages are dropped from the page cache, as far as the
    system permits; the disk's own cache remains. With an object store, this machine's cached
    blocks are dropped instead.

    Args:
        cache: the cache.
        hookpoints: hookpoints to read together; default: all.
        max_bytes: limit on the bytes of the shards; at least one shard is read.
        batch_size: rows of a batch; fewer if the shards have fewer.
        threads: number of reading threads; default: all read settings are probed.

    Raises:
        EmptyCacheError: there is no complete shard, or no row.
        HookpointError: the cache does not hold a hookpoint.
        CorruptShardError: a file is missing, or has another size or header.
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

    def plan_of(pool: int) -> OrderPlan:
        return make_plan(shards, cache.manifest.block_rows, batch_size, 0, pool)

    if threads is not None:
        reading = ReadSettings(threads)
    else:
        reading = probe_read_settings(cache, names, plan_of(POOL_ROWS)).reading

    def stream(pool: int) -> int:
        plan = plan_of(pool)
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
    for name, read_rows in ways:
        _drop_page_cache(files)
        for source in ("disk", "memory") if local else ("the store", "kept blocks"):
            began = time.perf_counter()
            speed = read_rows() / max(time.perf_counter() - began, 1e-9)
            found.append(Speed(f"{name}, from {source}", speed * row_bytes, speed))
    return Speeds(names, rows, rows * row_bytes, reading, batch_size, pool_rows, tuple(found))


def _drop_page_cache(files: Sequence[CachePath]) -> None:
    """Drop the cached pages, or cached blocks, of some files."""
    for path in files:
        if not isinstance(path, Path):
            require_remote(path).forget()
            continue
        with suppress(OSError):
            fd = open_file(path)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _read_all(files: Sequence[CachePath], threads: int) -> None:
    def read(share: Sequence[CachePath]) -> None:
        memory = memoryview(bytearray(_READ_BYTES))
        for path in share:
            if not isinstance(path, Path):
                require_remote(path).warm()
                continue
            with path.open("rb", buffering=0) as file:
                while file.readinto(memory):
                    pass

    with ThreadPoolExecutor(threads, "actcache-bench") as pool:
        for future in [pool.submit(read, files[i::threads]) for i in range(threads)]:
            future.result()
