"""Reading rows from files that may change meanwhile: verification, and a probe for fast settings.

Settings and probe cannot change the order of rows, see `shuffle_buffer`.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from actcache.cache.reader import Cache, Views, byte_views
from actcache.core.progress import format_bytes
from actcache.errors import CorruptShardError
from actcache.filesystem.paths import CachePath, require_remote
from actcache.storage import StoredRows
from actcache.storage.preadv import WHOLE
from actcache.stream.order import Epoch, OrderPlan, Span


@dataclass(frozen=True)
class ReadSettings:
    """Threads and calls with which rows are read."""

    threads: int = 2
    """Number of reading threads."""
    max_read_bytes: int = 256 << 10
    """Largest number of bytes of one read call: while it is copied, the disk reads on."""
    readahead: bool = False
    """Call posix_fadvise(WILLNEED) as soon as a window is scheduled."""

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        size = (
            "whole blocks"
            if self.max_read_bytes == WHOLE
            else f"{format_bytes(self.max_read_bytes)} at a time"
        )
        return f"{threads}, {size}" + (", announced ahead" if self.readahead else "")


DEFAULT = ReadSettings()
REMOTE = ReadSettings(threads=8, max_read_bytes=WHOLE)
"""Settings for an object store: latency of the network is the limit, not this machine."""

Verify = Literal["first-read", "always", "never"]

_Version = tuple[int | str, ...]
"""Fields of `stat` that change when the bytes of a file change."""


class VerifiedReader:
    """Reader of rows from files that match their receipts. Safe to use from several threads.

    `first-read` reads a file completely before its first rows are used, and compares size and
    digest. After every later read, `stat` detects whether the file was changed: then it is compared
    again, and its rows are read again. The first pass over a cache thus reads its bytes twice, the
    second time from the page cache if the cache fits there. Blocks of all shards are mixed, so most
    files are compared before the first batch; later epochs cost only the calls of `stat`.

    `always` compares a file for every window that has rows of it. The bytes read grow by the number
    of windows per shard: for small caches on unreliable disks.

    `never` checks sizes and headers once. A missing or too short file is still an error.

    Args:
        cache: source of the rows.
        verify: one of these three modes.
        reading: settings to read with.
    """

    def __init__(self, cache: Cache, verify: Verify, reading: ReadSettings = DEFAULT) -> None:
        self._cache, self._verify, self._settings = cache, verify, reading
        self._versions: dict[str, _Version] = {}  # of the files that were compared, by receipt name
        self._locks: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)

    def load(self, spans: Sequence[Span], out: Mapping[str, StoredRows]) -> None:
        """Read the rows of a window.

        Args:
            spans: position of the rows in the shards, in order.
            out: memory for all rows, by hookpoint.

        Raises:
            CorruptShardError: a file is missing, or does not match its receipt.
        """
        if self._verify == "always":
            for shard in {span.shard for span in spans}:
                for hookpoint in out:
                    with self._locks[hookpoint, shard]:
                        for name in self._cache.files_of(hookpoint, shard):
                            self._versions.pop(f"{shard}/{name}", None)
        memory = [
            (hookpoint, part, view, rows.parts[part])
            for hookpoint, rows in out.items()
            for part, view in byte_views(rows).items()
        ]
        first = 0
        for span in spans:
            views: dict[str, dict[str, list[memoryview]]] = {}
            for hookpoint, part, view, array in memory:
                size = array.itemsize * math.prod(array.shape[1:])  # bytes of a row
                chosen = view[first * size : (first + span.rows) * size]
                views.setdefault(hookpoint, {})[part] = [chosen]
            for hookpoint, parts in views.items():
                self._read(hookpoint, span, parts)
            first += span.rows

    def _read(self, hookpoint: str, span: Span, views: Views) -> None:
        while True:
            if self._verify != "never":
                self._compare(hookpoint, span.shard)
            size = self._settings.max_read_bytes
            self._cache.read_views(hookpoint, span.shard, span.start, views, size)
            # Checked after the read: then the bytes that were read are those that were compared.
            if self._verify == "never" or self._is_current(hookpoint, span.shard):
                return

    def readahead(self, spans: Iterable[Span], hookpoints: Iterable[str]) -> None:
        """Request readahead of spans from the operating system, if the settings enable it."""
        if self._settings.readahead:
            for span in spans:
                for hookpoint in hookpoints:
                    self._cache.readahead(hookpoint, span.shard, span.start, span.rows)

    def _compare(self, hookpoint: str, shard: int) -> None:
        """Compare the files of a shard's hookpoint with the receipt, unless already done."""
        with self._locks[hookpoint, shard]:  # a second thread waits instead of reading the file too
            for name, path in self._cache.files_of(hookpoint, shard).items():
                key = f"{shard}/{name}"
                version = _version(path)
                if self._versions.get(key) != version:
                    self._cache.compare_file(shard, name)
                    # The version before the comparison: a change during it is found next time.
                    self._versions[key] = version

    def _is_current(self, hookpoint: str, shard: int) -> bool:
        files = self._cache.files_of(hookpoint, shard).items()
        return all(self._versions.get(f"{shard}/{name}") == _version(path) for name, path in files)


def _version(path: CachePath) -> _Version:
    if not isinstance(path, Path):
        return (require_remote(path).version(),)  # each block is compared when it is fetched
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptShardError(
            f"{path} is gone",
            expected="the file that the receipt promises",
            remedy="actcache verify CACHE --repair, or restore a copy",
        ) from error
    # Not the device: a remount may renumber it.
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


CHANGES: tuple[dict[str, Any], ...] = (
    {"threads": 4},
    {"max_read_bytes": WHOLE},
    {"readahead": True},
)
"""Changes that the probe tries after the default; each that helps is kept for the next trial."""

_ROUND = 16 << 20  # bytes that each trial reads
_ENOUGH = 1.1  # a change that takes more from the machine must be faster by this factor


@dataclass(frozen=True)
class ProbeResult:
    """Read settings that `probe_read_settings` chose."""

    reading: ReadSettings
    bytes_per_second: float | None
    """Speed that the probe measured with these settings; None without a probe."""
    why_not: str = "too little to probe"
    """Reason for the lack of a probe."""


def probe_read_settings(
    cache: Cache, hookpoints: Sequence[str], plan: OrderPlan, epoch: int = 0
) -> ProbeResult:
    """Measure several settings on the first blocks of an epoch, each block read once.

    Trials: two threads, four threads, whole blocks, announced ahead. They read 64 MiB, which
    training reads again soon after. Nothing is read where that is more than 1/8 of the rows.

    Raises:
        CorruptShardError: a file is missing, or does not match its receipt.
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
    best, speed = ReadSettings(), 0.0
    for change in ({}, *CHANGES):
        trial = replace(best, **change)
        rows_per_second = _rows_per_second(cache, hookpoints, list(islice(spans, blocks)), trial)
        if rows_per_second > _ENOUGH * speed:
            best, speed = trial, rows_per_second
    return ProbeResult(best, speed * row_bytes)


def _rows_per_second(
    cache: Cache, hookpoints: Sequence[str], spans: Sequence[Span], settings: ReadSettings
) -> float:
    reader = VerifiedReader(cache, "never", settings)

    def read(share: Sequence[Span]) -> None:
        rows = max(span.rows for span in share)
        memory = {
            name: cache.row_dtype.empty(rows, cache.manifest.width(name)) for name in hookpoints
        }
        for number, span in enumerate(share):
            reader.readahead(share[number + 1 : number + 2], hookpoints)
            reader.load([span], {name: out[: span.rows] for name, out in memory.items()})

    with ThreadPoolExecutor(settings.threads, "actcache-probe") as pool:
        began = time.perf_counter()
        shares = [spans[i :: settings.threads] for i in range(settings.threads)]
        for future in [pool.submit(read, share) for share in shares if share]:
            future.result()
        return sum(span.rows for span in spans) / max(time.perf_counter() - began, 1e-9)
