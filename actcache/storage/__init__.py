"""How the rows of a shard lie on disk: backends behind one protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from actcache.atomic import FileReceipt
from actcache.storage.codec import CODECS, Array, Codec
from actcache.storage.memmap import MemmapBackend
from actcache.storage.safetensors_file import Extent

__all__ = ["BACKENDS", "CODECS", "Array", "Backend", "Codec", "Extent"]


class Backend(Protocol):
    """Writes rows, and says where their bytes lie; reading them is the reader's one job."""

    def path(self, root: Path, hookpoint: str, shard: int) -> Path:
        """Where a shard's rows of one hookpoint lie."""

    def write(
        self, root: Path, hookpoint: str, shard: int, rows: Array, codec: Codec
    ) -> FileReceipt:
        """Publish one shard's rows [rows, width], as stored."""

    def locate(
        self, root: Path, hookpoint: str, shard: int, shape: tuple[int, int], codec: Codec
    ) -> Extent:
        """Where the rows' bytes lie, checked; raises `CorruptShardError`."""


BACKENDS: dict[str, Backend] = {"memmap": MemmapBackend()}
"""Every backend, by its name in the manifest."""
