"""On-disk LRU cache of blocks of remote files, shared by processes and bounded in bytes.

One file per block: its digest, then its bytes. A block is written under an unpredictable partial
name and renamed, so that a killed process leaves no incomplete block; its digest is checked on
reading, so that a power loss leaves none either, without a sync per block. Abandoned partial files
are deleted later.

The lock file holds an upper bound on the bytes of all files: every block is added at its full size
before it is written, and the number is lowered only by listing the folder. So a killed process
can only make the bound too high. A process that does not get the lock within seconds reads without
the cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from actcache.errors import ConfigError, FormatError
from actcache.filesystem.rooted import open_file, rooted

DEFAULT_BYTES = 16 << 30
FOLDER_VARIABLE = "ACTCACHE_BLOCK_CACHE"
BYTES_VARIABLE = "ACTCACHE_BLOCK_CACHE_BYTES"

_DIGEST = 16  # bytes of XXH3-128
_LOCK = "lock"
_PARTIAL = ".partial-"
_BLOCK_NAME = re.compile(r"[0-9a-z]+-[0-9]+")
_REFUSALS = (OSError, FormatError)
_LOCK_WAIT = 10.0  # seconds to wait for the lock, which is held for much less
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
        self.folder, self.most_bytes = rooted(folder), most_bytes
        self._counted = False
        if not most_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                pass
        except BlockingIOError:  # a warning has been printed
            return
        except _REFUSALS as error:
            raise ConfigError(
                f"blocks of remote files cannot be cached in {folder}",
                expected="a writable folder",
                got=(isinstance(error, OSError) and error.strerror) or error,
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
        except _REFUSALS:
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
        partial = path.with_name(f"{_PARTIAL}{name}-{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            if not self._reserve(partial, size):
                return
            with partial.open("r+b", buffering=0) as file:
                for part in (xxhash.xxh3_128(data).digest(), data):
                    left = memoryview(part)
                    while left:
                        left = left[file.write(left) :]
            with self._locked():  # a process that lists the folder finds exactly one name
                partial.replace(path)
        except _REFUSALS:  # the cache is optional: reading continues without it
            with suppress(*_REFUSALS):
                partial.unlink()

    def drop(self, name: str) -> None:
        """Delete a block."""
        with suppress(*_REFUSALS):
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
            with partial.open("xb") as file:
                file.truncate(size)
        return True

    def _make_room(self, size: int) -> int:
        """Delete the least recently used blocks; return the bytes of the remaining ones.

        Files with other names, and links, were not made here and stay.
        """
        found: list[tuple[int, int, Path]] = []
        total, now = 0, time.time()
        for path in self._files():
            try:
                known = path.lstat()
                if not stat.S_ISREG(known.st_mode):
                    continue
                if path.name.startswith(_PARTIAL):
                    if now - known.st_mtime > _ABANDONED:
                        path.unlink()
                        continue
                else:
                    found.append((known.st_mtime_ns, known.st_size, path))
            except _REFUSALS:
                continue
            total += known.st_size
        if total + size <= self.most_bytes:
            return total
        aim = max(0, self.most_bytes - max(size, self.most_bytes // _SLACK))
        for _, each, path in sorted(found):
            if total <= aim:
                break
            with suppress(*_REFUSALS):
                path.unlink()
                total -= each
        return total

    def _files(self) -> Iterator[Path]:
        """List the blocks and the partial ones."""
        for folder in self.folder.iterdir():
            if len(folder.name) != 2:
                continue
            with suppress(*_REFUSALS):
                for path in folder.iterdir():
                    name = path.name.removeprefix(_PARTIAL)
                    if name.startswith(folder.name) and _BLOCK_NAME.match(name):
                        yield path

    @contextmanager
    def _locked(self) -> Iterator[int]:
        path = self.folder / _LOCK
        fd = open_file(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(fd).st_nlink > 1:  # writing to it would change another file
                raise OSError(errno.EMLINK, "the lock file has several names", str(path))
            if not _lock_within(fd, _LOCK_WAIT):
                self._give_up(path)
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
            yield fd
        finally:
            os.close(fd)  # releases the lock

    def _give_up(self, path: Path) -> None:
        """Stop using the folder, and print a warning once."""
        if self.most_bytes:
            self.most_bytes = 0
            sys.stderr.write(
                f"warning: {path} has been locked by another process for {_LOCK_WAIT:.0f} s; "
                "continuing without the block cache\n"
            )


def _lock_within(fd: int, seconds: float) -> bool:
    """Take the lock of a descriptor, waiting at most `seconds`; return whether it is taken.

    A thread waits in the kernel, which is fair; attempts at intervals starve beside other waiters.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        twin, taken = os.dup(fd), threading.Event()
    else:
        return True

    def take() -> None:
        try:
            fcntl.flock(twin, fcntl.LOCK_EX)
            taken.set()
        finally:
            os.close(twin)  # the lock goes with it if `fd` has been closed meanwhile

    threading.Thread(target=take, name="actcache-lock", daemon=True).start()
    return taken.wait(seconds)


def open_blocks(folder: str | os.PathLike[str] | None, most_bytes: int | None) -> BlockCache:
    """Open the block cache given by options, the environment, or the XDG default.

    Raises:
        ConfigError: a number of bytes is invalid, or the folder cannot be used.
    """
    if most_bytes is None:
        text = os.environ.get(BYTES_VARIABLE, str(DEFAULT_BYTES))
        if not text.isdecimal() or len(text) > 18:
            raise ConfigError(
                f"${BYTES_VARIABLE} is not a number of bytes", expected=">= 0", got=text
            )
        most_bytes = int(text)
    if type(most_bytes) is not int:  # True is one for isinstance
        raise ConfigError("--block-cache-bytes is no integer", expected=">= 0", got=most_bytes)
    if not isinstance(folder, str | os.PathLike | None):
        raise ConfigError("--block-cache is no path", expected="a folder", got=folder)
    if most_bytes < 0:
        raise ConfigError("--block-cache-bytes is too small", expected=">= 0", got=most_bytes)
    chosen = folder or os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return BlockCache(Path(chosen), most_bytes)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return BlockCache(Path(base).expanduser() / "actcache" / "blocks", most_bytes)
