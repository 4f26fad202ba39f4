"""The one way in which rows come off a disk: `preadv` into memory that is there already."""

from __future__ import annotations

import os
from pathlib import Path

from actcache.errors import CorruptShardError


def read_exactly(path: Path, view: memoryview, offset: int) -> None:
    """Fill `view` with a file's bytes from `offset` on.

    Raises:
        CorruptShardError: the file is gone, or ends early.
    """
    end = offset + len(view)
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise CorruptShardError(
            f"{path} is gone",
            expected="the file that was there when it was first read",
            remedy="restore it from a copy, or actcache verify CACHE --repair",
        ) from error
    try:
        while view:
            n = os.preadv(fd, [view], offset)
            if n == 0:
                raise CorruptShardError(
                    f"{path} ends early",
                    expected=f"at least {end} bytes",
                    got=f"{offset} bytes",
                    remedy="it was cut while it was being read; actcache verify CACHE --repair",
                )
            view, offset = view[n:], offset + n
    finally:
        os.close(fd)
