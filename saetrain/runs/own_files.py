"""Access to a run's own files: plain ones only, and nothing else is followed or deleted.

A run folder may come from elsewhere, and may hold links, pipes, or files of other programs. Links
and devices under a run's names are refused before the work. Files of other programs stay.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from actcache.core.json_codec import MAX_JSON_BYTES
from actcache.errors import FormatError

_OF_SAE = re.compile(r"(cfg\.json|sae\.safetensors)|\.(cfg\.json|sae\.safetensors)\.partial-.*")
_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder"}

FOREIGN = (".nfs", ".ipynb_checkpoints", ".DS_Store")
"""Beginnings of names that other programs leave in any folder."""


def require_plain(root: Path, names: Iterable[str]) -> None:
    """Require that names below a folder, and folders on the way, are no links or devices.

    Args:
        root: the folder.
        names: paths relative to it; those that do not exist are accepted.

    Raises:
        FormatError: one of them is a link, a pipe or a device.
    """
    for name in names:
        path = root
        for part in Path(name).parts:
            path = path / part
            try:
                mode = path.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                break
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise _refused(path, mode)


def read_plain(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a plain file.

    Args:
        path: the file.
        limit: largest size, bytes.

    Raises:
        FormatError: it is a link, a pipe, a folder or a device, or larger.
        OSError: it cannot be read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refused(path, stat.S_IFLNK) from error
        raise
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise _refused(path, found.st_mode)
    with os.fdopen(fd, "rb") as file:
        if found.st_size > limit:
            got = f"{found.st_size} bytes"
            raise FormatError(f"{path} is too large", expected=f"<= {limit} bytes", got=got)
        return file.read()


def is_plain(path: Path) -> bool:
    """Return whether a path is a plain file, not a link to one."""
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def remove_sae_folder(folder: Path) -> None:
    """Delete a folder of an exported SAE, unless it is a link or holds anything else."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        return
    files = list(folder.iterdir())
    if all(_OF_SAE.fullmatch(file.name) and is_plain(file) for file in files):
        for file in files:
            file.unlink()
        folder.rmdir()


def _refused(path: Path, mode: int) -> FormatError:
    kind = _KINDS.get(stat.S_IFMT(mode), "a device")
    return FormatError(
        f"{path} is {kind}",
        expected="a plain file or folder: nothing outside the run's folder is read or written",
        got=kind,
        remedy="put the whole run where the link points to (the run's folder itself may be a "
        "link), or remove it if it is not yours",
    )
