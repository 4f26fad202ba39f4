"""Read file bytes with `preadv` into existing memory; files of object stores via `RemotePath`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import get_ident
from time import monotonic

from actcache.errors import CorruptShardError
from actcache.filesystem.paths import CachePath, require_remote
from actcache.filesystem.rooted import open_to_read
from actcache.filesystem.slow_reads import READING

WHOLE = 1 << 62
"""Read size that never splits a read."""
_MOST_VIEWS = 1024
"""Largest number of views of one `preadv` call (IOV_MAX)."""


def read_exactly(path: CachePath, view: memoryview, offset: int) -> None:
    """Fill `view` with a file's bytes from `offset` on; see `preadv_into`."""
    preadv_into(path, [view], offset)


def preadv_into(
    path: CachePath, views: Sequence[memoryview], offset: int, piece: int = WHOLE
) -> None:
    """Fill views, one after another, with a file's consecutive bytes from `offset` on.

    Args:
        path: the file.
        views: memory for the bytes.
        offset: file offset of the first byte.
        piece: largest number of bytes of one `preadv` call.

    Raises:
        CorruptShardError: the file is gone, or ends early.
        FormatError: it is a link, or below one.
    """
    if not isinstance(path, Path):
        require_remote(path).read_into(views, offset)
        return
    left = deque(views)
    end = offset + sum(map(len, views))
    READING[thread := get_ident()] = monotonic(), path
    try:
        fd = open_to_read(path)
    except BaseException as error:
        del READING[thread]
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise
        raise CorruptShardError(
            f"{path} is gone",
            expected="the file that existed when the cache was opened",
            remedy="restore it from a copy, or actcache verify CACHE --repair",
        ) from error
    try:
        while offset < end:
            READING[thread] = monotonic(), path
            n = os.preadv(fd, _first(left, piece), offset)
            if n == 0:
                raise CorruptShardError(
                    f"{path} ends early",
                    expected=f"at least {end} bytes",
                    got=f"{offset} bytes",
                    remedy="it was truncated during the read; actcache verify CACHE --repair",
                )
            offset += n
            while left and n >= len(left[0]):
                n -= len(left.popleft())
            if n:
                left[0] = left[0][n:]
    finally:
        del READING[thread]
        os.close(fd)


def readahead(path: CachePath, offset: int, length: int) -> None:
    """Call posix_fadvise(WILLNEED) for a range of a local file, ignoring errors of the system."""
    if not isinstance(path, Path):
        return
    with suppress(OSError):
        fd = open_to_read(path)
        try:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)


def _first(views: Iterable[memoryview], most: int) -> list[memoryview]:
    """Select views, the last one cut, for one `preadv` call of at most `most` bytes."""
    chosen = []
    for view in islice(views, _MOST_VIEWS):
        chosen.append(view if len(view) <= most else view[:most])
        most -= len(view)
        if most <= 0:
            break
    return chosen
