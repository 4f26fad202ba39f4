"""Storage backends: how the rows of a shard are written to disk and located for reading."""

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
    """Writes rows and locates their bytes; `Cache` reads the bytes."""

    def path(self, root: CachePathT, hookpoint: str, shard: int) -> CachePathT:
        """Return the file of the values of a shard's rows of one hookpoint."""

    def files(self, root: CachePathT, manifest: Manifest, shard: int) -> dict[str, CachePathT]:
        """Return the files of a shard's rows, by their logical names in the receipt."""

    def initialize(self, root: Path, manifest: Manifest) -> None:
        """Write or check the metadata files, before the first shard, on one process."""

    def metadata_files(
        self, root: CachePathT, manifest: Manifest
    ) -> dict[CachePathT, tuple[bytes, ...]]:
        """Return the metadata files with their accepted contents, oldest first.

        There is one content for the first manifest and one per extension, since a crash can leave
        an older version. The last one is current.
        """

    def sizes(self, manifest: Manifest, rows: int) -> dict[str, int]:
        """Compute the uncompressed bytes of a shard's files, by the names of `files`."""

    def write(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: StoredRows
    ) -> dict[str, FileDigest]:
        """Write one shard's rows of one hookpoint; return digests by the names of `files`."""

    def locate(
        self, root: CachePath, manifest: Manifest, hookpoint: str, shard: int, rows: int, part: str
    ) -> TensorExtent | CompressedExtent:
        """Locate one component of `rows` rows, checking the file; raises `CorruptShardError`."""


BACKENDS: dict[str, Backend] = {"memmap": MemmapBackend(), "zarr": ZarrBackend()}
"""All backends, by their name in the manifest."""
