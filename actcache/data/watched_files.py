"""Files of text that must not change while rows are made of them.

A cache's id covers the digest of its text, and rows of another text must not get that id. So the
size and times of a file are compared after every read, and its digest if they differ. Bytes are
read with `pread`: a map of a file that is truncated ends the process (see `bus_errors`).
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import get_ident

import xxhash

from actcache.core.bus_errors import MAPPED
from actcache.errors import DatasetError
from actcache.filesystem.slow_reads import READING

_PIECE = 1 << 20  # bytes digested at a time
_REMEDY = (
    "restore it, and run the same command again: shards that are published hold the text from "
    "before; or harvest the new text into another --out"
)


class WatchedFile:
    """A file whose bytes must stay as they were when it was opened.

    Args:
        path: the file.
        held: read through a descriptor that stays open, so that a file that replaces this one under
            its name has no effect. False: others open it by its name.
        observe: function that is called with the bytes that are digested, piece by piece.
    """

    def __init__(
        self, path: Path, *, held: bool, observe: Callable[[bytes], None] | None = None
    ) -> None:
        self.path = path
        self._where: Path | int = path
        if held:
            self._where = _open(path)
            weakref.finalize(self, os.close, self._where)
        self._seen = self._state()
        self.bytes = self._seen[0]
        """Size of the file."""
        self.digest = self._digest(observe)
        """XXH3 128-bit digest, hexadecimal."""
        self.check()

    def check(self) -> None:
        """Raise `DatasetError` if the file has changed; call it after bytes have been read."""
        try:
            state = self._state()
            if state == self._seen:
                return
            digest = self._digest()
        except FileNotFoundError as error:
            raise DatasetError(f"{self.path} is gone", remedy=_REMEDY) from error
        if digest != self.digest or state[0] != self.bytes:
            raise DatasetError(
                f"{self.path} has changed since this command opened it",
                expected=f"{self.bytes:,} bytes with digest {self.digest}",
                got=f"{state[0]:,} bytes with digest {digest}",
                remedy=_REMEDY,
            )
        self._seen = state  # only touched

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes of a held file; raises `DatasetError` if it has changed."""
        assert isinstance(self._where, int)
        READING[get_ident()] = time.monotonic(), self.path
        try:
            data = read_at(self._where, offset, size)
        finally:
            del READING[get_ident()]
        self.check()
        return data

    def _state(self) -> tuple[int, ...]:
        found = os.stat(self._where)  # noqa: PTH116 (a path or a descriptor)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev

    def _digest(self, observe: Callable[[bytes], None] | None = None) -> str:
        digest, offset = xxhash.xxh3_128(), 0
        fd = self._where if isinstance(self._where, int) else _open(self._where)
        try:
            READING[get_ident()] = time.monotonic(), self.path
            while piece := os.pread(fd, _PIECE, offset):
                digest.update(piece)
                if observe is not None:
                    observe(piece)
                offset += len(piece)
                READING[get_ident()] = time.monotonic(), self.path
        finally:
            READING.pop(get_ident(), None)
            if fd != self._where:
                os.close(fd)
        return digest.hexdigest()


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Read bytes at an offset, fewer at the end of the file; beyond 2 GiB, Linux reads in parts."""
    data = os.pread(fd, size, offset)
    if len(data) == size:
        return data
    pieces = [data]
    while pieces[-1] and (size := size - len(pieces[-1])):
        offset += len(pieces[-1])
        pieces.append(os.pread(fd, size, offset))
    return b"".join(pieces)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class MappedFiles:
    """Files that a library has mapped: they must not be written to. Their names do not matter.

    Args:
        paths: the files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._before = {path: _place_and_state(path) for path in paths}
        MAPPED.add(self)

    def check(self) -> None:
        """Raise `DatasetError` if a file has changed; call it before and after a map is read."""
        for path, before in self._before.items():
            now = _place_and_state(path)
            # A map stays as it is if its file is deleted, or replaced under its name.
            if now is not None and before is not None and now[0] == before[0] and now != before:
                raise DatasetError(
                    f"{path} has changed since this command opened it",
                    expected=f"{before[1][0]:,} bytes, unchanged",
                    got=f"{now[1][0]:,} bytes",
                    remedy=_REMEDY,
                )


def _place_and_state(path: Path) -> tuple[tuple[int, int], tuple[int, int]] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)
