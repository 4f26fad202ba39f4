"""Access to the files of a folder: opened without following links, published by atomic rename.

A `RootedPath` lies within a folder that the user named, its root. The root may lie behind links;
below it every folder is opened relative to the descriptor of the one before, with O_NOFOLLOW, and a
file must be a plain one: links, pipes and devices are neither read, written, replaced nor deleted.
Of any other `Path`, the folder that holds the file counts as the root.

A file is written under an unpredictable partial name, synced, renamed, and its folder is synced.
Space is reserved first and filled with `pwrite`: on a full disk a writable map is killed by
SIGBUS, whereas a failed reservation raises an error.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import IO, Any, ClassVar, Protocol

from actcache.errors import CacheBusyError, DiskFullError, FileSystemError, FormatError

LOCK = Path("logs") / "harvest.lock"
_LOCK_ATTEMPTS = 5
_LOCK_PAUSE = 0.02  # seconds between attempts: `is_unlocked` holds the lock for an instant
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_PARTIAL = ".partial-"
_MOST_HOLDER = 200  # bytes of a lock file that an error quotes
_PIECE = 1 << 20  # bytes read and hashed at a time
_CHUNK = 16 << 20  # bytes written and hashed at a time: small enough to stay in cache
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_MODES = {
    "r": 0,
    "w": os.O_CREAT | os.O_TRUNC,
    "a": os.O_CREAT | os.O_APPEND,
    "x": os.O_CREAT | os.O_EXCL,
}
_STRAYS = ("lost+found", "Thumbs.db", "desktop.ini", "@eaDir", "__MACOSX")
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


class RootedPath(PosixPath):
    """A path whose methods that open, list or delete follow no link below its root.

    Made by `rooted`. Paths derived from it, such as `path / name`, have the same root.
    """

    __slots__ = ()
    _top: ClassVar[tuple[str, ...]] = ()
    """Components of the root."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the root with the path."""
        return _restored, (self._top, str(self))

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Open a plain file; raises `FormatError` for anything else."""
        writes = os.O_WRONLY if mode[0] != "r" else os.O_RDONLY
        flags = _MODES[mode[0]] | (os.O_RDWR if "+" in mode else writes)
        fd = open_to_read(self) if flags == os.O_RDONLY else open_file(self, flags)
        return os.fdopen(fd, mode, buffering, encoding, errors, newline)

    def iterdir(self) -> Iterator[RootedPath]:  # type: ignore[override]
        """List the folder; raises `FormatError` if it is a link."""
        folder = _open_folder(self)
        try:
            names = os.listdir(folder)  # noqa: PTH208 (of a descriptor)
        finally:
            os.close(folder)
        return iter([self / name for name in names])

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete a plain file; raises `FormatError` for anything else."""
        try:
            folder = _open_folder(self, self.parts[:-1])
            try:
                _require_plain(self, folder)
                os.unlink(self.name, dir_fd=folder)
            finally:
                os.close(folder)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def replace(self, target: str | os.PathLike[str]) -> RootedPath:
        """Rename the file to `target`, absent or a plain file; return the new path."""
        new = target if isinstance(target, RootedPath) else type(self)(target)
        source = _open_folder(self, self.parts[:-1])
        try:
            folder = _open_folder(new, new.parts[:-1])
            try:
                _require_plain(new, folder)
                os.replace(self.name, new.name, src_dir_fd=source, dst_dir_fd=folder)
            finally:
                os.close(folder)
        finally:
            os.close(source)
        return new

    def rmdir(self) -> None:
        """Delete an empty folder; raises an error if it is a link."""
        folder = _open_folder(self, self.parts[:-1])
        try:
            os.rmdir(self.name, dir_fd=folder)
        finally:
            os.close(folder)

    def mkdir(
        self,
        mode: int = 0o777,
        parents: bool = False,  # noqa: ARG002
        exist_ok: bool = False,
    ) -> None:
        """Create the folder, and missing ones above it whether or not `parents` is set."""
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))
        os.close(_open_folder(self, create=True, mode=mode))


@functools.lru_cache(maxsize=1024)
def _of_root(root: tuple[str, ...]) -> type[RootedPath]:
    # A class for each root, so that pathlib itself hands the root on.
    return type("RootedPath", (RootedPath,), {"_top": root, "__slots__": ()})


def _restored(root: tuple[str, ...], path: str) -> RootedPath:
    return _of_root(root)(path)


def rooted(folder: str | Path) -> RootedPath:
    """Return a folder as the root of the paths below it; a path that has a root keeps it."""
    if isinstance(folder, RootedPath):
        return folder
    return _of_root(Path(folder).parts)(folder)


def open_file(path: Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
    """Open a plain file and return its descriptor.

    Args:
        path: the file.
        flags: those of `os.open`.
        mode: mode of a new file.

    Raises:
        FormatError: the file, or a folder below the root, is a link, or the file is no plain one.
        OSError: it cannot be opened.
    """
    folder = _open_folder(path, path.parts[:-1])
    try:
        # Looked at first, since opening a device can act on it.
        _require_plain(path, folder)
        fd = os.open(path.name, flags | _PLAIN, mode, dir_fd=folder)
    except OSError as error:
        raise _of_path(error, path) from None
    finally:
        os.close(folder)
    if not stat.S_ISREG((found := os.fstat(fd)).st_mode):  # it was exchanged meanwhile
        os.close(fd)
        raise _refused(path, found.st_mode)
    return fd


class _KeptFolder:
    """A folder that stays open, and which one it is."""

    def __init__(self, path: Path) -> None:
        self.fd = _open_folder(path)
        found = os.fstat(self.fd)
        self.identity = found.st_dev, found.st_ino

    def __del__(self) -> None:
        with suppress(AttributeError):
            os.close(self.fd)


_kept_folder = functools.lru_cache(maxsize=128, typed=True)(_KeptFolder)
"""Folders from which files were opened lately; one that is dropped is closed after its last use."""


def open_to_read(path: Path) -> int:
    """Open a plain file as `open_file` does, with fewer system calls where its folder is known.

    Used for rows, which are read in thousands of pieces.
    """
    folder = path.parent
    try:
        found = folder.lstat()
        kept = _kept_folder(folder)
        if kept.identity == (found.st_dev, found.st_ino):  # the path leads there still
            fd = os.open(path.name, os.O_RDONLY | _PLAIN, dir_fd=kept.fd)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
    except OSError:
        pass
    return open_file(path)  # raises the error that describes it


def require_plain(root: Path, files: Iterable[str], folders: Iterable[str] = ()) -> None:
    """Raise `FormatError` if a file or folder below `root`, or one above it, is anything else.

    A command calls it before its work, so that a link is refused before hours are spent.

    Args:
        root: the folder.
        files: paths of files within it; those that do not exist are accepted.
        folders: paths of folders within it.
    """
    top = rooted(root)
    kinds = dict.fromkeys(files, stat.S_IFREG) | dict.fromkeys(folders, stat.S_IFDIR)
    for name, kind in kinds.items():
        path = top / name
        for part in (*reversed(path.parents), path):
            if len(part.parts) <= len(top.parts):
                continue
            try:
                mode = part.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                break
            if stat.S_IFMT(mode) != (kind if part is path else stat.S_IFDIR):
                raise _refused(part, mode)


def require_plain_entries(folder: Path, names: re.Pattern[str]) -> None:
    """Raise `FormatError` if an entry of a folder with such a name is a link or a device."""
    try:
        fd = _open_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                if not names.fullmatch(entry.name):
                    continue
                if not entry.is_file(follow_symlinks=False):
                    mode = entry.stat(follow_symlinks=False).st_mode
                    if not stat.S_ISDIR(mode):
                        raise _refused(folder / entry.name, mode)
    finally:
        os.close(fd)


def walk(root: Path) -> Iterator[tuple[Path, bool]]:
    """List all below a folder that is no folder: each path, and whether it is a plain file.

    Links are listed and not followed.
    """
    for place, folders, names, fd in _walk(root):
        for name in (*folders, *names):
            with suppress(FileNotFoundError):
                mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
                if not stat.S_ISDIR(mode):
                    yield root / place / name, stat.S_ISREG(mode)


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str], int]]:
    """Walk as `os.fwalk` does, which opens links to folders before it leaves them out.

    Yields each folder relative to the root, the names of folders in it, all other names, and a
    descriptor of it. Folders that the caller removes from the list are not entered.
    """
    fd = _open_folder(root)
    try:
        yield from _walk_below("", fd)
    finally:
        os.close(fd)


def _walk_below(place: str, fd: int) -> Iterator[tuple[str, list[str], list[str], int]]:
    folders: list[str] = []
    names: list[str] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            (folders if entry.is_dir(follow_symlinks=False) else names).append(entry.name)
    yield place, folders, names, fd
    for name in folders:
        try:
            inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
        except OSError:  # it is gone, was exchanged, or may not be read
            continue
        try:
            yield from _walk_below(f"{place}/{name}" if place else name, inner)
        finally:
            os.close(inner)


def is_stray(name: str) -> bool:
    """Return whether notebooks, file managers and file systems leave files of such a name."""
    return name.startswith(".") or name in _STRAYS


def _open_folder(
    path: Path, parts: tuple[str, ...] | None = None, *, create: bool = False, mode: int = 0o777
) -> int:
    """Open a folder, following no link below the root; return its descriptor.

    Args:
        path: a path; it decides the root.
        parts: components of the folder; None: those of the path.
        create: create missing folders and sync those that hold them, so that a power loss keeps
            the names of their files.
        mode: mode of created folders.
    """
    parts = path.parts if parts is None else parts
    root = path._top if isinstance(path, RootedPath) else parts
    depth = min(len(root), len(parts))
    if parts[:depth] != root[:depth] or ".." in parts[depth:]:
        raise FormatError(
            f"{path} leads out of its folder", expected=f"a path below {Path(*root)}", got=str(path)
        )
    top = Path(*parts[:depth])
    if create:
        _make_folder(top, mode)
    fd = os.open(top, _FOLDER)
    try:
        for name in parts[depth:]:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(name, mode, dir_fd=fd)
                    os.fsync(fd)
            inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
    except OSError as error:
        os.close(fd)
        for end in range(depth + 1, len(parts) + 1):
            with suppress(OSError):
                folder = Path(*parts[:end])
                if stat.S_ISLNK(found := folder.lstat().st_mode):
                    raise _refused(type(path)(folder), found) from None
        raise _of_path(error, Path(*parts)) from None
    return fd


def _require_plain(path: Path, folder: int) -> None:
    """Raise `FormatError` if `path`, whose folder is open, exists and is no plain file."""
    with suppress(FileNotFoundError):
        found = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise _refused(path, found.st_mode)


def _of_path(error: OSError, path: Path) -> OSError:
    """Return an error of a system call relative to a folder, with the whole path."""
    return OSError(error.errno, error.strerror, str(path))


def _refused(path: Path, mode: int) -> FormatError:
    kind = _KINDS.get(stat.S_IFMT(mode), "a device")
    root = Path(*path._top) if isinstance(path, RootedPath) else path.parent
    expected = f"plain files and folders: nothing outside {root} is read or written"
    remedy = "remove it"
    if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
        expected, remedy = "a file" if stat.S_ISDIR(mode) else "a folder", "move it elsewhere"
    if stat.S_ISLNK(mode):
        remedy = (
            f"remove the link; to use another disk, put all of {root} there (it may itself be a "
            "link), or mount a folder of the disk here with mount --bind"
        )
    return FormatError(
        f"{path} is {kind}",
        expected=expected,
        got=kind,
        remedy=remedy,
    )


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
        FormatError: `path` is there and no plain file, or a folder below the root is a link.
    """
    import xxhash  # --help reads this module, and needs the standard library only

    buffers = [memoryview(part).cast("B") for part in parts if len(part)]
    size = sum(len(buffer) for buffer in buffers)
    partial = f".{path.name}{_PARTIAL}{secrets.token_hex(8)}"
    digest = xxhash.xxh3_128()
    try:
        folder = _open_folder(path, path.parts[:-1], create=True)
    except OSError as error:
        raise as_disk_full_error(error, path, size) from error
    try:
        _require_plain(path, folder)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o644, dir_fd=folder)
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
        os.replace(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except OSError as error:
        if not isinstance(error, FileExistsError):  # else the partial file is not ours
            with suppress(OSError):
                os.unlink(partial, dir_fd=folder)
        raise as_disk_full_error(_of_path(error, path), path, size) from error
    finally:
        os.close(folder)
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


def _make_folder(folder: Path, mode: int) -> None:
    """Create a folder and sync its new parents, so that a power loss keeps its files' names."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(mode, parents=True, exist_ok=True)
    for created in missing:
        fsync_dir(created.parent)


def _pwrite_all(fd: int, chunk: memoryview, offset: int) -> None:
    while chunk:
        written = os.pwrite(fd, chunk, offset)
        chunk, offset = chunk[written:], offset + written


def fsync_dir(folder: Path) -> None:
    """Sync a folder, which makes the names in it durable."""
    fd = _open_folder(folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_partials(root: Path) -> int:
    """Delete partial files below `root` that killed writers left; return their number.

    Links are left alone, and hidden folders, none of which is ours. Call it under the folder's
    lock: a partial file of a live writer would be deleted too.
    """
    removed = 0
    for _, folders, names, folder in _walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") or _PARTIAL not in name:
                continue
            with suppress(FileNotFoundError):
                if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=folder)
                    removed += 1
    return removed


def remove_tree(path: Path) -> None:
    """Delete a temporary folder of ours and all in it, as far as possible; a link stays."""
    with suppress(OSError):
        folder = _open_folder(path, path.parts[:-1])
        try:
            shutil.rmtree(path.name, ignore_errors=True, dir_fd=folder)
        finally:
            os.close(folder)


def remove_trees(root: Path, prefix: str) -> None:
    """Delete the temporary folders of ours directly below a root whose names begin so."""
    for path in rooted(root).iterdir():
        if path.name.startswith(prefix):
            remove_tree(path)


def open_log(path: Path) -> IO[bytes]:
    """Open a log for appending, unbuffered: after a write fails, closing must not retry it.

    Of a file with several names (hard links), such as that of a copy by `cp -al`, an own copy is
    made first, so that the other names keep their content.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    fd = open_file(path, flags)
    if os.fstat(fd).st_nlink > 1:
        os.close(fd)
        with os.fdopen(open_file(path), "rb") as file:
            write_atomic(path, [file.read()])
        fd = open_file(path, flags)
    return os.fdopen(fd, "ab", 0)


class Digestible(Protocol):
    """A file that computes its own digest: a `RemotePath`."""

    def digest(self, advance: Callable[[int], None]) -> tuple[int, str]:
        """Compute size and XXH3-128."""


def digest_file(
    path: Path | Digestible, advance: Callable[[int], None] = lambda _: None
) -> FileDigest:
    """Compute size and digest of a file; call `advance` with the bytes of every chunk read.

    Raises:
        FormatError: it is below a root, and a link or no plain file.
    """
    if not isinstance(path, Path):
        return FileDigest(*path.digest(advance))
    import xxhash

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
        self._root, self._path, self._work = root, rooted(root) / path, work
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
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
    for _ in range(_LOCK_ATTEMPTS - 1):
        with suppress(BlockingIOError):
            _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
            return
        time.sleep(_LOCK_PAUSE)
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
