"""Files of a folder, opened, listed and deleted without following links.

A `RootedPath` lies within a folder that the user named, its root. The root may lie behind links;
below it every folder is opened relative to the descriptor of the one before, with O_NOFOLLOW, and a
file must be a plain one: links, pipes and devices are neither read, written, replaced nor deleted.
Of any other `Path`, the folder that holds the file counts as the root.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PosixPath
from typing import IO, Any, ClassVar

from actcache.errors import FormatError

PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""Flags with which a file is opened, so that a link or pipe in its place has no effect."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
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
        folder = open_folder(self)
        try:
            names = os.listdir(folder)  # noqa: PTH208 (of a descriptor)
        finally:
            os.close(folder)
        return iter([self / name for name in names])

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete a plain file; raises `FormatError` for anything else."""
        try:
            folder = open_folder(self, self.parts[:-1])
            try:
                require_plain_at(self, folder)
                os.unlink(self.name, dir_fd=folder)
            finally:
                os.close(folder)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def replace(self, target: str | os.PathLike[str]) -> RootedPath:
        """Rename the file to `target`, absent or a plain file; return the new path."""
        new = target if isinstance(target, RootedPath) else type(self)(target)
        source = open_folder(self, self.parts[:-1])
        try:
            folder = open_folder(new, new.parts[:-1])
            try:
                require_plain_at(new, folder)
                os.replace(self.name, new.name, src_dir_fd=source, dst_dir_fd=folder)
            finally:
                os.close(folder)
        finally:
            os.close(source)
        return new

    def rmdir(self) -> None:
        """Delete an empty folder; raises an error if it is a link."""
        folder = open_folder(self, self.parts[:-1])
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
        os.close(open_folder(self, create=True, mode=mode))


@functools.lru_cache(maxsize=1024)
def _of_root(root: tuple[str, ...]) -> type[RootedPath]:
    # A class for each root, so that pathlib itself hands the root on.
    return type("RootedPath", (RootedPath,), {"_top": root, "__slots__": ()})


def _restored(root: tuple[str, ...], path: str) -> RootedPath:
    return _of_root(root)(path)


def rooted(folder: str | os.PathLike[str]) -> RootedPath:
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
    folder = open_folder(path, path.parts[:-1])
    try:
        # Checked first, since opening a device can act on it.
        require_plain_at(path, folder)
        fd = os.open(path.name, flags | PLAIN, mode, dir_fd=folder)
    except OSError as error:
        raise with_path(error, path) from None
    finally:
        os.close(folder)
    if not stat.S_ISREG((found := os.fstat(fd)).st_mode):  # it was exchanged meanwhile
        os.close(fd)
        raise _refused(path, found.st_mode)
    return fd


class _KeptFolder:
    """A folder that stays open, and which one it is."""

    def __init__(self, path: Path) -> None:
        self.fd = open_folder(path)
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
            fd = os.open(path.name, os.O_RDONLY | PLAIN, dir_fd=kept.fd)
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
        fd = open_folder(folder)
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
    for place, folders, names, fd in walk_folders(root):
        for name in (*folders, *names):
            with suppress(FileNotFoundError):
                mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
                if not stat.S_ISDIR(mode):
                    yield root / place / name, stat.S_ISREG(mode)


def walk_folders(
    root: Path, *, hidden: bool = True
) -> Iterator[tuple[str, list[str], list[str], int]]:
    """Walk as `os.fwalk` does, which opens links to folders before it leaves them out.

    Yields each folder relative to the root, the names of folders in it, all other names, and a
    descriptor of it.

    Args:
        root: the folder.
        hidden: enter folders whose names begin with a dot.
    """
    fd = open_folder(root)
    try:
        yield from _walk_below("", fd, hidden)
    finally:
        os.close(fd)


def _walk_below(
    place: str, fd: int, hidden: bool
) -> Iterator[tuple[str, list[str], list[str], int]]:
    folders: list[str] = []
    names: list[str] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            (folders if entry.is_dir(follow_symlinks=False) else names).append(entry.name)
    yield place, folders, names, fd
    for name in folders:
        if name.startswith(".") and not hidden:
            continue
        try:
            inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
        except OSError:  # it is gone, was exchanged, or may not be read
            continue
        try:
            yield from _walk_below(f"{place}/{name}" if place else name, inner, hidden)
        finally:
            os.close(inner)


def is_stray(name: str) -> bool:
    """Return whether notebooks, file managers or file systems create files of this name."""
    return name.startswith(".") or name in _STRAYS


def open_folder(
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
        raise with_path(error, Path(*parts)) from None
    return fd


def _make_folder(folder: Path, mode: int) -> None:
    """Create a folder and sync its new parents, so that a power loss keeps its files' names."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(mode, parents=True, exist_ok=True)
    for created in missing:
        fsync_dir(created.parent)


def fsync_dir(folder: Path) -> None:
    """Sync a folder, which makes the names in it durable."""
    fd = open_folder(folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def require_plain_at(path: Path, folder: int) -> None:
    """Raise `FormatError` if `path`, whose folder is open, exists and is no plain file."""
    with suppress(FileNotFoundError):
        found = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise _refused(path, found.st_mode)


def with_path(error: OSError, path: Path) -> OSError:
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


def remove_tree(path: Path) -> None:
    """Delete a temporary folder with its contents, as far as possible; a link stays."""
    with suppress(OSError):
        folder = open_folder(path, path.parts[:-1])
        try:
            shutil.rmtree(path.name, ignore_errors=True, dir_fd=folder)
        finally:
            os.close(folder)


def remove_trees(root: Path, prefix: str) -> None:
    """Delete the temporary folders directly below `root` whose names begin with `prefix`."""
    for path in rooted(root).iterdir():
        if path.name.startswith(prefix):
            remove_tree(path)
