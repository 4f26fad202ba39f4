"""Files that appear whole: written under a partial name, published by atomic rename, digested.

The partial name cannot be foreseen. The file is synced, renamed, and its folder is synced. Space is
reserved first and filled with `pwrite`: on a full disk a writable map is killed by SIGBUS, whereas
a failed reservation raises an error.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import IO, Protocol

from actcache.errors import DiskFullError
from actcache.filesystem.rooted import (
    PLAIN,
    open_file,
    open_folder,
    require_plain_at,
    walk_folders,
    with_path,
)
from actcache.filesystem.slow_reads import READING, WRITING

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
        FormatError: `path` is there and no plain file, or a folder below the root is a link.
    """
    import xxhash  # --help reads this module, and needs the standard library only

    buffers = [memoryview(part).cast("B") for part in parts if len(part)]
    size = sum(len(buffer) for buffer in buffers)
    partial = f".{path.name}{_PARTIAL}{secrets.token_hex(8)}"
    digest = xxhash.xxh3_128()
    try:
        folder = open_folder(path, path.parts[:-1], create=True)
    except OSError as error:
        raise as_disk_full_error(error, path, size) from error
    try:
        require_plain_at(path, folder)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o644, dir_fd=folder)
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
            offset = 0
            for buffer in buffers:
                for start in range(0, len(buffer), _CHUNK):
                    WRITING[get_ident()] = time.monotonic(), path
                    chunk = buffer[start : start + _CHUNK]
                    _pwrite_all(fd, chunk, offset + start)
                    digest.update(chunk)
                offset += len(buffer)
            WRITING[get_ident()] = time.monotonic(), path
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except OSError as error:
        if not isinstance(error, FileExistsError):  # else the partial file is not ours
            with suppress(OSError):
                os.unlink(partial, dir_fd=folder)
        raise as_disk_full_error(with_path(error, path), path, size) from error
    finally:
        WRITING.pop(get_ident(), None)
        os.close(folder)
    return FileDigest(size, digest.hexdigest())


def _read_piece(path: Path, file: IO[bytes], piece: memoryview) -> int:
    READING[get_ident()] = time.monotonic(), path
    return file.readinto(piece)  # type: ignore[attr-defined, no-any-return]


def _pwrite_all(fd: int, chunk: memoryview, offset: int) -> None:
    while chunk:
        written = os.pwrite(fd, chunk, offset)
        chunk, offset = chunk[written:], offset + written


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


def remove_partials(root: Path) -> int:
    """Delete partial files below `root` that killed writers left; return their number.

    Links and hidden folders, which no writer here makes, are left. Call it under the folder's
    lock: a partial file of a live writer would be deleted too.
    """
    removed = 0
    for _, _, names, folder in walk_folders(root, hidden=False):
        for name in names:
            if not name.startswith(".") or _PARTIAL not in name:
                continue
            with suppress(FileNotFoundError):
                if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=folder)
                    removed += 1
    return removed


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
        try:
            while n := _read_piece(path, file, piece):
                digest.update(piece[:n])
                size += n
                advance(n)
        finally:
            READING.pop(get_ident(), None)
    return FileDigest(size, digest.hexdigest())
