"""Lock of a folder, so that two commands never write to it at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from actcache.errors import CacheBusyError, FileSystemError, FormatError
from actcache.filesystem.atomic import as_disk_full_error
from actcache.filesystem.rooted import open_file, rooted

LOCK = Path("logs") / "harvest.lock"
_ATTEMPTS = 5
_PAUSE = 0.02  # seconds between attempts: `is_unlocked` holds the lock for an instant
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_MOST_HOLDER = 200  # bytes of a lock file that an error quotes


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
        self._root, self._path, self._work = root, rooted(root) / path, work
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """True if this process holds the lock."""
        return self._fd is not None

    def acquire(self) -> None:
        """Take the lock for this harvest or fit.

        Raises:
            CacheBusyError: another one holds it.
            FileSystemError: the file system has no locks.
            FormatError: the lock file, or its folder, is a link.
        """
        holder_id = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n"
        record = holder_id.encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = open_file(self._path, os.O_RDWR | os.O_CREAT)
            _take_alone(self._fd, self._path)
            if os.fstat(self._fd).st_nlink == 1:  # else it is another file, too
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, record, 0)
            _flock(self._fd, fcntl.LOCK_SH, self._path)
        except BlockingIOError as error:
            assert self._fd is not None
            holder = os.pread(self._fd, _MOST_HOLDER, 0).decode(errors="replace").strip()
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
            self._fd = open_file(self._path, os.O_RDWR)
            _flock(self._fd, fcntl.LOCK_SH, self._path)

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_unlocked(root: Path, path: Path = LOCK) -> bool:
    """Return whether no process holds the lock of a folder; False if that cannot be determined."""
    try:
        fd = open_file(rooted(root) / path)
    except FileNotFoundError:
        return True
    except (OSError, FormatError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _take_alone(fd: int, path: Path) -> None:
    for _ in range(_ATTEMPTS - 1):
        with suppress(BlockingIOError):
            _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
            return
        time.sleep(_PAUSE)
    _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, path)


def _flock(fd: int, operation: int, path: Path) -> None:
    try:
        fcntl.flock(fd, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise FileSystemError(
            f"{path} cannot be locked: its file system has no locks",
            expected="a file system with flock(), so that two processes never write to one folder",
            got=f"{error.strerror} on {_file_system(path)}",
            remedy="put the folder on a local disk, or have the file system mounted with locks "
            "(Lustre: -o flock; NFS: version 4, or a running lock service)",
        ) from error


def _file_system(path: Path) -> str:
    """Describe the file system of a path as Linux lists it."""
    place, found = str(path.resolve()), (0, "an unknown file system")
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            before, after = line.split(" - ", 1)
            point = before.split()[4]
            if f"{place}/".startswith(f"{point.rstrip('/')}/"):
                found = max(found, (len(point), f"{after.split()[0]} at {point}"))
    return found[1]
