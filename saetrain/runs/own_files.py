"""Deletion of a run's own files: plain ones only.

A run folder may come from elsewhere, and may hold links, pipes, or files of other programs. Those
stay.
"""

from __future__ import annotations

import re
import stat
from contextlib import suppress
from pathlib import Path

import xxhash

from actcache.filesystem.atomic import FileDigest

_OF_SAE = re.compile(r"(cfg\.json|sae\.safetensors)|\.(cfg\.json|sae\.safetensors)\.partial-.*")


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
