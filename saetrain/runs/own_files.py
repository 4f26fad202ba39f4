"""Reading and deletion of a run's own files: plain ones only.

A run folder may come from elsewhere, and may hold links, pipes, or files of other programs. Those
stay.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

import xxhash

from actcache.core.json_codec import MAX_JSON_BYTES
from actcache.errors import FormatError
from actcache.filesystem.atomic import FileDigest, open_file

_OF_SAE = re.compile(r"(cfg\.json|sae\.safetensors)|\.(cfg\.json|sae\.safetensors)\.partial-.*")


def read_plain(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a plain file.

    Args:
        path: the file.
        limit: largest size, bytes.

    Raises:
        FormatError: it is a link, a pipe, a folder or a device, or larger.
        OSError: it cannot be read.
    """
    with os.fdopen(open_file(path), "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found > limit:
            got = f"{found} bytes"
            raise FormatError(f"{path} is too large", expected=f"<= {limit} bytes", got=got)
        return file.read()


def digest_bytes(data: bytes) -> FileDigest:
    """Return the digest of bytes that were read."""
    return FileDigest(len(data), xxhash.xxh3_128(data).hexdigest())


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
