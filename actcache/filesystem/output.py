"""Files that the user names for the result of a command, such as an HTML page."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from actcache.errors import ConfigError
from actcache.filesystem.atomic import write_atomic

_DESCRIPTOR = re.compile(r"/dev/(?:(stdout)|(stderr)|fd/([0-9]{1,9}))")

_OURS = (("manifest.json", "shards"), ("run.json",))
"""Entries by which the folder of a cache or run is known."""


def require_output(path: Path, option: str) -> None:
    """Check the place of a result before the work.

    A missing or plain file is replaced by rename; a pipe, a terminal and another character device
    are written to, and so are /dev/stdout, /dev/stderr and /dev/fd/N.

    Args:
        path: the place.
        option: the option that names it, for error messages.

    Raises:
        ConfigError: it is a link, a folder, a socket or a disk, or within a cache or run.
    """
    inside = path.absolute().parent.resolve()
    for folder in (inside, *inside.parents):
        if any(all((folder / name).exists() for name in names) for names in _OURS):
            raise ConfigError(
                f"{option} {path} lies within the cache or run {folder}",
                expected="a place outside: a file there could be one that it needs",
                remedy="name a file elsewhere",
            )
    mode = _mode(path)
    if not (stat.S_ISREG(mode) or _is_written_to(mode)):
        kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder"}
        raise ConfigError(
            f"{option} {path} would replace what is no plain file",
            expected="a new or plain file, a pipe, or /dev/stdout",
            got=kinds.get(stat.S_IFMT(mode), "a socket or device"),
            remedy="name the file itself",
        )


def write_output(path: Path, data: bytes, option: str) -> None:
    """Write a result to a place that `require_output` accepts.

    Raises:
        ConfigError: as `require_output`, or the pipe has no reader.
        DiskFullError: the disk is full.
    """
    require_output(path, option)
    if not _is_written_to(_mode(path)):
        write_atomic(path, [data])
        return
    named = _DESCRIPTOR.fullmatch(str(path))
    try:
        if named:
            fd = os.dup(1 if named[1] else 2 if named[2] else int(named[3]))
        else:
            # Non-blocking, since opening a pipe would wait for a reader for ever.
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EBADF):
            raise
        raise ConfigError(
            f"{option} {path} cannot be written",
            expected="a pipe that another program reads, or an open descriptor",
            got=os.strerror(error.errno),
        ) from error
    try:
        os.set_blocking(fd, True)
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]
    finally:
        os.close(fd)


def _mode(path: Path) -> int:
    if _DESCRIPTOR.fullmatch(str(path)):
        return stat.S_IFIFO
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return stat.S_IFREG


def _is_written_to(mode: int) -> bool:
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
