"""Blocks of remote files on this machine: never more bytes than were allowed, the oldest go first.

One file per block: its digest, then its bytes. It is made under another name and renamed, so that a
process that is killed leaves no half block; and read with its digest, so that a machine that loses
power leaves none either, without a sync for each. What a killed process was at goes after a while.

The lock's file holds the bytes of all files, or more: every block is counted, at its full size,
before it is written, and nothing is ever taken off but by counting what is there. So any number of
processes may share the folder, and the count is wrong to the safe side when one of them dies.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from actcache.errors import ConfigError

DEFAULT_BYTES = 16 << 30
FOLDER_VARIABLE = "ACTCACHE_BLOCK_CACHE"
BYTES_VARIABLE = "ACTCACHE_BLOCK_CACHE_BYTES"

_DIGEST = 16  # bytes of XXH3-128
_LOCK = "lock"
_PARTIAL = ".partial-"
_ABANDONED = 600.0  # seconds after which a partial file is nobody's
_SLACK = 10  # of so many parts, one is freed at once: to look at all files is slow


class BlockCache:
    """A folder of blocks. Safe from several threads and processes.

    Args:
        folder: of this machine; made when missing.
        most_bytes: that all its files may have together; 0: nothing is kept.

    Raises:
        ConfigError: the folder cannot be made or written in.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._counted = False
        if not most_bytes:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                pass
        except OSError as error:
            raise ConfigError(
                f"blocks of remote files cannot be kept in {folder}",
                expected="a folder to write in",
                got=error.strerror or str(error),
                remedy=f"--block-cache or ${FOLDER_VARIABLE}: another folder; or "
                f"--block-cache-bytes 0",
            ) from error

    def get(self, name: str, size: int) -> bytes | None:
        """A block of `size` bytes, whole; None if it is not here."""
        if not self.most_bytes:
            return None
        try:
            with self._path(name).open("rb", buffering=0) as file:
                data = file.read(_DIGEST + size + 1)
                os.utime(file.fileno())
        except OSError:
            return None
        if (
            len(data) != _DIGEST + size
            or xxhash.xxh3_128(data[_DIGEST:]).digest() != data[:_DIGEST]
        ):
            self.drop(name)
            return None
        return data[_DIGEST:]

    def holds(self, name: str) -> bool:
        """Whether there is a file for a block: it may be gone the next moment."""
        return bool(self.most_bytes) and self._path(name).exists()

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Keep a block if there is room for it, or can be made. A full disk keeps none."""
        size = _DIGEST + len(data)
        if size > self.most_bytes:
            return
        path = self._path(name)
        thread = f"{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}"
        partial = path.with_name(f"{_PARTIAL}{name}-{thread}")
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            if not self._reserve(partial, size):
                return
            with partial.open("r+b", buffering=0) as file:
                for part in (xxhash.xxh3_128(data).digest(), data):
                    left = memoryview(part)
                    while left:
                        left = left[file.write(left) :]
            with self._locked():  # whoever counts sees it under one name
                partial.replace(path)
        except OSError:  # blocks are a convenience: reading goes on without
            with suppress(OSError):
                partial.unlink()

    def drop(self, name: str) -> None:
        """Forget a block."""
        with suppress(OSError):
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _reserve(self, partial: Path, size: int) -> bool:
        """Make room for a file of `size` bytes, and the file."""
        with self._locked() as fd:
            text = os.pread(fd, 32, 0)
            total = int(text) if text.isdigit() and self._counted else None
            if total is None or total + size > self.most_bytes:
                total = self._make_room(size)
                self._counted = True
            if total + size > self.most_bytes:
                return False
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(total + size).encode(), 0)
            with partial.open("wb") as file:
                file.truncate(size)
        return True

    def _make_room(self, size: int) -> int:
        """Delete the blocks that were not used for longest; bytes that are left."""
        found: list[tuple[int, int, Path]] = []
        total, now = 0, time.time()
        for path in self.folder.glob("??/*"):
            try:
                known = path.stat()
                if path.name.startswith(_PARTIAL):
                    if now - known.st_mtime > _ABANDONED:
                        path.unlink()
                        continue
                else:
                    found.append((known.st_mtime_ns, known.st_size, path))
            except OSError:
                continue
            total += known.st_size
        if total + size <= self.most_bytes:
            return total
        aim = max(0, self.most_bytes - max(size, self.most_bytes // _SLACK))
        for _, each, path in sorted(found):
            if total <= aim:
                break
            with suppress(OSError):
                path.unlink()
                total -= each
        return total

    @contextmanager
    def _locked(self) -> Iterator[int]:
        fd = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)  # lets go of the lock, as dying does


def open_blocks(folder: str | None, most_bytes: int | None) -> BlockCache:
    """The cache of blocks that options name, or else the environment, or else custom.

    Raises:
        ConfigError: a number of bytes is none, or the folder cannot be used.
    """
    if most_bytes is None:
        text = os.environ.get(BYTES_VARIABLE, str(DEFAULT_BYTES))
        if not text.isdigit():
            raise ConfigError(f"${BYTES_VARIABLE} is no number of bytes", expected=">= 0", got=text)
        most_bytes = int(text)
    if most_bytes < 0:
        raise ConfigError("--block-cache-bytes is too small", expected=">= 0", got=most_bytes)
    chosen = folder or os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return BlockCache(Path(chosen), most_bytes)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return BlockCache(Path(base).expanduser() / "actcache" / "blocks", most_bytes)
