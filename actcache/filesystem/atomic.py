"""Files appear whole or not at all: partial name, fsync, rename, fsync of the folder.

Space is reserved first and filled with `pwrite`: a writable map on a full disk dies of SIGBUS,
whereas a reservation fails with an error that can be told.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from actcache.errors import CacheBusyError, DiskFullError
from actcache.filesystem.paths import CachePath, require_remote

LOCK = Path("logs") / "harvest.lock"
_LOCK_ATTEMPTS = 5
_LOCK_PAUSE = 0.02  # seconds between attempts: `is_unlocked` holds the lock for an instant
_PARTIAL = ".partial-"
_PIECE = 1 << 20  # bytes read and hashed at a time
_CHUNK = 16 << 20  # bytes written and hashed at a time: small enough to stay in cache


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a published file must be."""

    bytes: int
    """Size of the whole file, bytes."""
    xxh3_128: str
    """XXH3 128-bit digest of the whole file, hexadecimal."""


def write_atomic(path: Path, parts: Iterable[memoryview | bytes]) -> FileDigest:
    """Write `parts` one after another as the file `path`, which appears only when it is whole.

    Args:
        path: the final name; its folder is made when missing.
        parts: byte buffers (any C-contiguous memoryview).

    Raises:
        DiskFullError: the disk or the quota is full; nothing is left behind.
    """
    buffers = [memoryview(part).cast("B") for part in parts if len(part)]
    size = sum(len(buffer) for buffer in buffers)
    # Containers that share a folder may share process numbers too.
    writer = f"{os.uname().nodename}-{os.getpid()}"
    partial = path.with_name(f".{path.name}{_PARTIAL}{writer}")
    digest = xxhash.xxh3_128()
    try:
        _make_folder(path.parent)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
            offset = 0
            for buffer in buffers:
                for start in range(0, len(buffer), _CHUNK):
                    chunk = buffer[start : start + _CHUNK]
                    _pwrite_all(fd, chunk, offset + start)
                    digest.update(chunk)
                offset += len(buffer)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(partial, path)  # noqa: PTH105 (tests stand in for os.replace)
        fsync_dir(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise as_disk_full_error(error, path, size) from error
    return FileDigest(size, digest.hexdigest())


def as_disk_full_error(error: OSError, path: Path, size: int) -> Exception:
    """A `DiskFullError` if that is what `error` means, else `error` itself.

    Args:
        error: what writing raised.
        path: what could not be written.
        size: bytes that it needs.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return DiskFullError(
        f"no room to write {path}",
        expected=f"{size:,} bytes free",
        got=os.strerror(error.errno),
        remedy="free space and run the same command again: what is published stays valid",
    )


def _make_folder(folder: Path) -> None:
    """Make a folder durable: what is published in it must not vanish with its name."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_dir(made.parent)


def _pwrite_all(fd: int, chunk: memoryview, offset: int) -> None:
    while chunk:
        written = os.pwrite(fd, chunk, offset)
        chunk, offset = chunk[written:], offset + written


def fsync_dir(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_partials(root: Path) -> int:
    """Delete what killed writers left below `root`; returns how many files.

    Only for a time when nobody writes there.
    """
    partials = [p for p in root.rglob(f".*{_PARTIAL}*") if p.is_file() and not p.is_symlink()]
    for partial in partials:
        partial.unlink(missing_ok=True)
    return len(partials)


def digest_file(path: CachePath, advance: Callable[[int], None] = lambda _: None) -> FileDigest:
    """Size and digest of a file as it is now; `advance` hears of every piece, in bytes."""
    if not isinstance(path, Path):
        return FileDigest(*require_remote(path).digest(advance))
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        # Memory that is used again: a fresh piece for each read costs as much as the read.
        piece = memoryview(bytearray(min(_PIECE, os.fstat(file.fileno()).st_size + 1)))
        while n := file.readinto(piece):
            digest.update(piece[:n])
            size += n
            advance(n)
    return FileDigest(size, digest.hexdigest())


class DirectoryLock:
    """Held from `take` or `join` until `release`, or until the process ends.

    Args:
        root: the folder.
        path: the lock's file within it.
        work: what is done there, for errors.
    """

    def __init__(self, root: Path, path: Path = LOCK, work: str = "harvest") -> None:
        self._root, self._path, self._work = root, root / path, work
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether it is."""
        return self._fd is not None

    def acquire(self) -> None:
        """Become the one at work in this folder.

        Raises:
            CacheBusyError: another one is at work here.
        """
        who = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n".encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open(os.O_CREAT)
            assert self._fd is not None
            _take_alone(self._fd)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, who, 0)
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        except BlockingIOError as error:
            holder = self._path.read_text(errors="replace").strip()
            self.release()
            raise CacheBusyError(
                f"another {self._work} is at work in {self._root}",
                got=holder or "no name",
                remedy="wait for it, or stop it: what it has published stays",
            ) from error
        except OSError as error:
            self.release()
            raise as_disk_full_error(error, self._path, len(who)) from error
        except BaseException:
            self.release()
            raise

    def acquire_shared(self) -> None:
        """Hold the lock that rank 0 of this harvest has taken."""
        if self._fd is None:
            self._open()
            assert self._fd is not None
            fcntl.flock(self._fd, fcntl.LOCK_SH)

    def release(self) -> None:
        """Let go; nothing happens if it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self, create: int = 0) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | create, 0o644)


def is_unlocked(root: Path, path: Path = LOCK) -> bool:
    """Whether nobody holds the lock of a folder. Where that cannot be told: no."""
    try:
        fd = os.open(root / path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _take_alone(fd: int) -> None:
    for _ in range(_LOCK_ATTEMPTS - 1):
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_LOCK_PAUSE)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
