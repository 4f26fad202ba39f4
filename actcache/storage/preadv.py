"""The one way in which rows come off a disk: `preadv` into memory that is there already.

Those of a store come by way of blocks that are kept on this machine, see `remote`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from actcache.errors import CorruptShardError
from actcache.filesystem.paths import CachePath, require_remote

WHOLE = 1 << 62
"""Bytes of a read that is not cut."""


_MOST_VIEWS = 1024
"""That one call of the kernel takes (IOV_MAX)."""


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
        offset: of the first one.
        piece: bytes that one call asks for, at most.

    Raises:
        CorruptShardError: the file is gone, or ends early.
    """
    if not isinstance(path, Path):
        require_remote(path).read_into(views, offset)
        return
    left = deque(views)
    end = offset + sum(map(len, views))
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise CorruptShardError(
            f"{path} is gone",
            expected="the file that was there when it was first read",
            remedy="restore it from a copy, or actcache verify CACHE --repair",
        ) from error
    try:
        while offset < end:
            n = os.preadv(fd, _first(left, piece), offset)
            if n == 0:
                raise CorruptShardError(
                    f"{path} ends early",
                    expected=f"at least {end} bytes",
                    got=f"{offset} bytes",
                    remedy="it was cut while it was being read; actcache verify CACHE --repair",
                )
            offset += n
            while left and n >= len(left[0]):
                n -= len(left.popleft())
            if n:
                left[0] = left[0][n:]
    finally:
        os.close(fd)


def readahead(path: CachePath, offset: int, length: int) -> None:
    """Tell the system that bytes will be wanted soon; whether they are there is asked later."""
    if not isinstance(path, Path):
        return
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)


def _first(views: Iterable[memoryview], most: int) -> list[memoryview]:
    """The first bytes of some views: as many as are asked for at once."""
    chosen = []
    for view in islice(views, _MOST_VIEWS):
        chosen.append(view if len(view) <= most else view[:most])
        most -= len(view)
        if most <= 0:
            break
    return chosen
