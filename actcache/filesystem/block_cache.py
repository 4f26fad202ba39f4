"""On-disk LRU cache of blocks of remote files, shared by processes and bounded in bytes.

One file per block: its digest, then its bytes. A block is written under a partial name and renamed,
so that a killed process leaves no incomplete block; its digest is checked on reading, so that a
power loss leaves none either, without a sync per block. Abandoned partial files are deleted later.

The lock file holds an upper bound on the bytes of all files: every block is added at its full size
before it is written, and the number is lowered only by listing the folder. So a process that dies
can only make the bound too high.
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
_ABANDONED = 600.0  # seconds after which a partial file counts as abandoned
_SLACK = 10  # an eviction frees 1/10 of the capacity, as listing all files is slow


class BlockCache:
    """A folder of blocks, safe for concurrent threads and processes.

    Args:
        folder: local folder; created when missing.
        most_bytes: capacity of the folder; 0 disables the cache.

    Raises:
        ConfigError: the folder cannot be created or written.
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
                f"blocks of remote files cannot be cached in {folder}",
                expected="a writable folder",
                got=error.strerror or str(error),
                remedy=f"--block-cache or ${FOLDER_VARIABLE}: another folder; or "
                f"--block-cache-bytes 0",
            ) from error

    def get(self, name: str, size: int) -> bytes | None:
        """Return a block of `size` bytes; None if it is missing or damaged."""
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
        """Return whether a block's file exists; another process may delete it at any time."""
        return bool(self.most_bytes) and self._path(name).exists()

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Store a block, evicting others if necessary; a full disk is ignored."""
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
            with self._locked():  # a process that lists the folder sees exactly one name
                partial.replace(path)
        except OSError:  # the cache is optional: reading continues without it
            with suppress(OSError):
                partial.unlink()

    def drop(self, name: str) -> None:
        """Delete a block."""
        with suppress(OSError):
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _reserve(self, partial: Path, size: int) -> bool:
        """Reserve `size` bytes and create the partial file; return False if there is no room."""
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
        """Delete the least recently used blocks; return the bytes of the remaining ones."""
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
            os.close(fd)  # releases the lock


def open_blocks(folder: str | None, most_bytes: int | None) -> BlockCache:
    """Open the block cache given by options, the environment, or the XDG default.

    Raises:
        ConfigError: a number of bytes is invalid, or the folder cannot be used.
    """
    if most_bytes is None:
        text = os.environ.get(BYTES_VARIABLE, str(DEFAULT_BYTES))
        if not text.isdigit():
            raise ConfigError(
                f"${BYTES_VARIABLE} is not a number of bytes", expected=">= 0", got=text
            )
        most_bytes = int(text)
    if most_bytes < 0:
        raise ConfigError("--block-cache-bytes is too small", expected=">= 0", got=most_bytes)
    chosen = folder or os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return BlockCache(Path(chosen), most_bytes)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return BlockCache(Path(base).expanduser() / "actcache" / "blocks", most_bytes)
