"""One harvest, or one fit, at a time in a folder, however many processes it has.

The lock is the kernel's, on a small file, so it goes when its holders do, killed or not. Rank 0
takes it alone, which fails while anyone holds it, then shares it; the other ranks join. The last to
leave frees the folder.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from actcache.errors import CacheBusyError
from actcache.filesystem.atomic import as_disk_full_error

LOCK = Path("logs") / "harvest.lock"
_TRIES = 5
_PAUSE = 0.02  # seconds between tries: whoever looks whether it is free holds it for a moment


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
    for _ in range(_TRIES - 1):
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_PAUSE)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
