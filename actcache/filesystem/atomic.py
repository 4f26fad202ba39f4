"""Files appear whole or not at all: partial name, fsync, rename, fsync of the folder.

Space is reserved first and filled with `pwrite`: a writable map on a full disk dies of SIGBUS,
whereas a reservation fails with an error that can be told.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from actcache.errors import DiskFullError
from actcache.filesystem.paths import CachePath, require_remote

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
