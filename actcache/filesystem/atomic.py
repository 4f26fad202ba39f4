"""Atomic publication of files, and the lock that admits one writer to a folder.

A file is written under a partial name, synced, renamed, and its folder is synced. Space is reserved
first and filled with `pwrite`: on a full disk a writable map is killed by SIGBUS, whereas a failed
reservation raises an error.
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
    """Size and checksum of a whole file."""

    bytes: int
    xxh3_128: str
    """XXH3 128-bit digest, hexadecimal."""


def write_atomic(path: Path, parts: Iterable[memoryview | bytes]) -> FileDigest:
    """Write `parts` one after another as the file `path`, by atomic rename.

    Args:
        path: the final name; its folder is created when missing.
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
        os.replace(partial, path)  # noqa: PTH105 (tests patch os.replace)
        fsync_dir(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise as_disk_full_error(error, path, size) from error
    return FileDigest(size, digest.hexdigest())


def as_disk_full_error(error: OSError, path: Path, size: int) -> Exception:
    """Return a `DiskFullError` for ENOSPC and EDQUOT, `error` itself otherwise.

    Args:
        error: the error that writing raised.
        path: the file that could not be written.
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
    """Create a folder and sync its new parents, so that a power loss keeps its files' names."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for created in missing:
        fsync_dir(created.parent)


def _pwrite_all(fd: int, chunk: memoryview, offset: int) -> None:
    while chunk:
        written = os.pwrite(fd, chunk, offset)
        chunk, offset = chunk[written:], offset + written


def fsync_dir(folder: Path) -> None:
    """Sync a folder, which makes the names in it durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_partials(root: Path) -> int:
    """Delete partial files below `root` that killed writers left; return their number.

    Call it under the folder's lock: a partial file of a live writer would be deleted too.
    """
    partials = [p for p in root.rglob(f".*{_PARTIAL}*") if p.is_file() and not p.is_symlink()]
    for partial in partials:
        partial.unlink(missing_ok=True)
    return len(partials)


def digest_file(path: CachePath, advance: Callable[[int], None] = lambda _: None) -> FileDigest:
    """Compute size and digest of a file; call `advance` with the bytes of every chunk read."""
    if not isinstance(path, Path):
        return FileDigest(*require_remote(path).digest(advance))
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        # One reused buffer: allocating a fresh one for each read costs as much as the read.
        piece = memoryview(bytearray(min(_PIECE, os.fstat(file.fileno()).st_size + 1)))
        while n := file.readinto(piece):
            digest.update(piece[:n])
            size += n
            advance(n)
    return FileDigest(size, digest.hexdigest())


class DirectoryLock:
    """Lock of a folder for one harvest or fit, shared by all its processes.

    It is a `flock` on a small file, so the kernel drops it when the last holder exits or is killed.
    Rank 0 calls `acquire`, which takes the lock exclusively and then downgrades it to shared; the
    other ranks call `acquire_shared`.

    Args:
        root: the folder.
        path: the lock file within it.
        work: name of the activity, for error messages.
    """

    def __init__(self, root: Path, path: Path = LOCK, work: str = "harvest") -> None:
        self._root, self._path, self._work = root, root / path, work
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
        return self._fd is not None

    def acquire(self) -> None:
        """Take the lock for this harvest or fit.

        Raises:
            CacheBusyError: another one holds it.
        """
        holder_id = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n"
        record = holder_id.encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open(os.O_CREAT)
            assert self._fd is not None
            _take_alone(self._fd)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, record, 0)
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        except BlockingIOError as error:
            holder = self._path.read_text(errors="replace").strip()
            self.release()
            raise CacheBusyError(
                f"another {self._work} is running in {self._root}",
                got=holder or "an unknown process",
                remedy="wait for it, or stop it: the shards that it has published stay",
            ) from error
        except OSError as error:
            self.release()
            raise as_disk_full_error(error, self._path, len(record)) from error
        except BaseException:
            self.release()
            raise

    def acquire_shared(self) -> None:
        """Join the lock that rank 0 of this harvest holds."""
        if self._fd is None:
            self._open()
            assert self._fd is not None
            fcntl.flock(self._fd, fcntl.LOCK_SH)

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self, create: int = 0) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | create, 0o644)


def is_unlocked(root: Path, path: Path = LOCK) -> bool:
    """Return whether no process holds the lock of a folder; False if that cannot be determined."""
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
