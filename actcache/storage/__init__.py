"""How the rows of a shard lie on disk: backends behind one protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from actcache.filesystem.atomic import FileDigest
from actcache.filesystem.paths import CachePath, CachePathT
from actcache.format.dtypes import (
    ROW_DTYPES,
    Array,
    RowDtype,
    StoredRows,
    check_infinite,
    check_overflow,
)
from actcache.format.manifest import Manifest
from actcache.storage.blosc import CompressedExtent
from actcache.storage.safetensors_io import MemmapBackend, TensorExtent
from actcache.storage.zarr import ZarrBackend

__all__ = [
    "BACKENDS",
    "ROW_DTYPES",
    "Array",
    "Backend",
    "CompressedExtent",
    "RowDtype",
    "StoredRows",
    "TensorExtent",
    "check_infinite",
    "check_overflow",
]


class Backend(Protocol):
    """Writes rows, and says where their bytes lie; reading them is the reader's one job."""

    def path(self, root: CachePathT, hookpoint: str, shard: int) -> CachePathT:
        """Where the numbers of a shard's rows of one hookpoint lie."""

    def files(self, root: CachePathT, manifest: Manifest, shard: int) -> dict[str, CachePathT]:
        """The files of a shard's rows, by the name that its receipt has for them."""

    def initialize(self, root: Path, manifest: Manifest) -> None:
        """Make, or check, what must stand before the first shard. One process does it."""

    def metadata_files(
        self, root: CachePathT, manifest: Manifest
    ) -> dict[CachePathT, tuple[bytes, ...]]:
        """Files that stand beside the shards, with the bytes that follow from the manifest.

        One for each extension and one before them all: a crash may leave a document of earlier.
        The last is what it ought to be.
        """

    def sizes(self, manifest: Manifest, rows: int) -> dict[str, int]:
        """Bytes of a shard's files, by the names of `files`, as they are without compression."""

    def write(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: StoredRows
    ) -> dict[str, FileDigest]:
        """Publish one shard's rows of one hookpoint; receipts by the names of `files`."""

    def locate(
        self, root: CachePath, manifest: Manifest, hookpoint: str, shard: int, rows: int, part: str
    ) -> TensorExtent | CompressedExtent:
        """Where one part of `rows` rows lies, checked; raises `CorruptShardError`."""


BACKENDS: dict[str, Backend] = {"memmap": MemmapBackend(), "zarr": ZarrBackend()}
"""Every backend, by its name in the manifest."""
