"""Rows of files that may change while they are read: none is handed out that was not promised."""

from __future__ import annotations

import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actcache.cache.reader import Cache, Views, byte_views
from actcache.core.progress import format_bytes
from actcache.errors import CorruptShardError
from actcache.filesystem.paths import CachePath, require_remote
from actcache.storage import StoredRows
from actcache.storage.preadv import WHOLE
from actcache.stream.order import Span


@dataclass(frozen=True)
class ReadSettings:
    """What `probe` chooses among."""

    threads: int = 2
    """That read."""
    max_read_bytes: int = 256 << 10
    """Bytes that one call asks for, at most: while it copies them, the disk goes on."""
    readahead: bool = False
    """Whether the system hears of a window as soon as it is known to be needed."""

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        pieces = (
            "whole blocks"
            if self.max_read_bytes == WHOLE
            else f"{format_bytes(self.max_read_bytes)} at a time"
        )
        return f"{threads}, {pieces}" + (", announced ahead" if self.readahead else "")


DEFAULT = ReadSettings()


Verify = Literal["first-read", "always", "never"]

_Version = tuple[int | str, ...]
"""What `stat` says of a file, and a change of its bytes changes."""


class VerifiedReader:
    """Reads rows out of files that are what their receipts promise. Safe from several threads.

    `first-read` reads a file in full, front to back, before its first rows are used, and compares
    size and digest. After every later read, `stat` tells whether it is still that file: one that
    was touched since is compared again, and its rows are read again. So the first pass over a cache
    reads its bytes twice, at the speed of the disk where the cache is larger than the page cache,
    and of memory the second time where it is not. Blocks of all shards are mixed, so most of that
    comes before the first batch; an epoch later on costs nothing but the `stat`.

    `always` compares a file for every window that has rows of it: as many times the bytes as a
    shard has windows, for small caches on disks that are not to be trusted.

    `never` looks at sizes and headers only, once; a file that is gone or too short is still told.

    Args:
        cache: where the rows are.
        verify: which of these.
        reading: how to read.
    """

    def __init__(self, cache: Cache, verify: Verify, reading: ReadSettings = DEFAULT) -> None:
        self._cache, self._verify, self.reading = cache, verify, reading
        self._versions: dict[str, _Version] = {}  # of the files that were compared, by receipt name
        self._locks: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)

    def load(self, spans: Iterable[Span], out: Mapping[str, StoredRows]) -> None:
        """Read the rows of a window.

        Args:
            spans: where they lie, in order.
            out: by hookpoint, memory for all of them.

        Raises:
            CorruptShardError: a file is gone, or is not what its receipt promises.
        """
        spans = list(spans)
        whole = {name: byte_views(rows) for name, rows in out.items()}
        sizes = {name: row_sizes(rows) for name, rows in out.items()}
        filled, places = 0, []
        for span in spans:
            stop = filled + span.rows
            places.append(
                {
                    name: {
                        part: [view[filled * sizes[name][part] : stop * sizes[name][part]]]
                        for part, view in views.items()
                    }
                    for name, views in whole.items()
                }
            )
            filled = stop
        self.load_views(spans, places)

    def load_views(self, spans: Sequence[Span], out: Sequence[Mapping[str, Views]]) -> None:
        """As `total_cost`, each span into places of its own, by hookpoint."""
        if self._verify == "always":
            for shard in {span.shard for span in spans}:
                for hookpoint in out[0]:
                    self._forget(hookpoint, shard)
        for span, places in zip(spans, out, strict=True):
            for hookpoint, views in places.items():
                self._read(hookpoint, span, views)

    def _read(self, hookpoint: str, span: Span, views: Views) -> None:
        if self._verify == "never":
            self._read_views(hookpoint, span, views)
            return
        while True:
            self._compare(hookpoint, span.shard)
            self._read_views(hookpoint, span, views)
            # After the read, not before it: these bytes are those that were compared.
            if self._is_current(hookpoint, span.shard):
                return

    def _read_views(self, hookpoint: str, span: Span, views: Views) -> None:
        self._cache.read_views(
            hookpoint, span.shard, span.start, views, self.reading.max_read_bytes
        )

    def readahead(self, spans: Iterable[Span], hookpoints: Iterable[str]) -> None:
        """Tell the system what will be loaded soon, if that is how to read."""
        if self.reading.readahead:
            for span in spans:
                for hookpoint in hookpoints:
                    self._cache.readahead(hookpoint, span.shard, span.start, span.rows)

    def _compare(self, hookpoint: str, shard: int) -> None:
        """Compare the files of a shard's hookpoint with the receipt, unless that is done."""
        with self._locks[hookpoint, shard]:  # whoever comes second waits instead of reading too
            for name, path in self._cache.files_of(hookpoint, shard).items():
                key = f"{shard}/{name}"
                version = _version(path)
                if self._versions.get(key) != version:
                    self._cache.compare_file(shard, name)
                    self._versions[key] = version  # of before: a change meanwhile is seen next time

    def _is_current(self, hookpoint: str, shard: int) -> bool:
        files = self._cache.files_of(hookpoint, shard).items()
        return all(self._versions.get(f"{shard}/{name}") == _version(path) for name, path in files)

    def _forget(self, hookpoint: str, shard: int) -> None:
        with self._locks[hookpoint, shard]:
            for name in self._cache.files_of(hookpoint, shard):
                self._versions.pop(f"{shard}/{name}", None)


def row_sizes(rows: StoredRows) -> dict[str, int]:
    """Bytes of one row, by part."""
    return {name: part.itemsize * math.prod(part.shape[1:]) for name, part in rows.parts.items()}


def _version(path: CachePath) -> _Version:
    if not isinstance(path, Path):
        return (
            require_remote(path).version(),
        )  # each block is compared as it is read, see `remote`
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
