"""The memmap backend: one safetensors file per shard and hookpoint, tensor `activations`.

The scales of 8-bit rows are its second tensor.
"""

from __future__ import annotations

from pathlib import Path

from actcache.filesystem.atomic import FileDigest
from actcache.filesystem.paths import CachePath, CachePathT
from actcache.format.dtypes import ROW_DTYPES, VALUES, StoredRows
from actcache.format.manifest import Manifest
from actcache.format.schema import Spec
from actcache.storage import safetensors_io as safetensors_file
from actcache.storage.safetensors_io import TensorExtent


class MemmapBackend:
    """Rows of a shard as a self-describing file that any safetensors library can map."""

    def path(self, root: CachePathT, hookpoint: str, shard: int) -> CachePathT:
        """Where a shard's rows of one hookpoint lie."""
        return root / "activations" / hookpoint / f"{shard:05d}.safetensors"

    def initialize(self, root: Path, manifest: Manifest) -> None:
        """Nothing: every file describes itself."""

    def metadata_files(
        self,
        root: CachePathT,  # noqa: ARG002
        manifest: Manifest,  # noqa: ARG002
    ) -> dict[CachePathT, tuple[bytes, ...]]:
        """None."""
        return {}

    def files(self, root: CachePathT, manifest: Manifest, shard: int) -> dict[str, CachePathT]:
        """The files of a shard's rows, by the name that its receipt has for them."""
        names = (hookpoint.name for hookpoint in manifest.identity.hookpoints)
        return {f"{VALUES}/{name}": self.path(root, name, shard) for name in names}

    def sizes(self, manifest: Manifest, rows: int) -> dict[str, int]:
        """Bytes of the files of a shard of so many rows, by the names of `files`."""
        return {
            f"{VALUES}/{h.name}": safetensors_file.size(_tensors(manifest, h.name, rows))
            for h in manifest.identity.hookpoints
        }

    def write(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: StoredRows
    ) -> dict[str, FileDigest]:
        """Publish one shard's rows of one hookpoint."""
        parts = ROW_DTYPES[manifest.identity.dtype].parts(manifest.width(hookpoint))
        tensors = {name: (rows.parts[name], part.tag) for name, part in parts.items()}
        path = self.path(root, hookpoint, shard)
        return {f"{VALUES}/{hookpoint}": safetensors_file.write(path, tensors)}

    def locate(
        self, root: CachePath, manifest: Manifest, hookpoint: str, shard: int, rows: int, part: str
    ) -> TensorExtent:
        """Where the bytes of one part of the rows lie, checked against what is expected.

        Raises:
            CorruptShardError: the file is missing or has another shape, type or size.
        """
        path, expected = self.path(root, hookpoint, shard), _tensors(manifest, hookpoint, rows)
        extents = safetensors_file.locate(path, expected)
        return extents[list(expected).index(part)]


def _tensors(manifest: Manifest, hookpoint: str, rows: int) -> dict[str, Spec]:
    parts = ROW_DTYPES[manifest.identity.dtype].parts(manifest.width(hookpoint))
    return {name: ((rows, *part.shape), part.storage, part.tag) for name, part in parts.items()}
