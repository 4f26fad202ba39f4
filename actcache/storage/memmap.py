"""The memmap backend: one safetensors file per shard and hookpoint, tensor `activations`."""

from __future__ import annotations

from pathlib import Path

from actcache.atomic import FileReceipt
from actcache.manifest import Manifest
from actcache.storage import safetensors_file
from actcache.storage.codec import CODECS, Array
from actcache.storage.safetensors_file import Extent

_TENSOR = "activations"


class MemmapBackend:
    """Rows of a shard as a self-describing file that any safetensors library can map."""

    def path(self, root: Path, hookpoint: str, shard: int) -> Path:
        """Where a shard's rows of one hookpoint lie."""
        return root / "activations" / hookpoint / f"{shard:05d}.safetensors"

    def lay(self, root: Path, manifest: Manifest) -> None:
        """Nothing: every file describes itself."""

    def documents(self, root: Path, manifest: Manifest) -> dict[Path, bytes]:  # noqa: ARG002
        """None."""
        return {}

    def write(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: Array
    ) -> FileReceipt:
        """Publish one shard's rows [rows, width], as stored."""
        path = self.path(root, hookpoint, shard)
        tag = CODECS[manifest.identity.dtype].tag
        return safetensors_file.write(path, {_TENSOR: (rows, tag)})

    def locate(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: int
    ) -> Extent:
        """Where the rows' bytes lie, checked against what is expected.

        Raises:
            CorruptShardError: the file is missing or has another shape, type or size.
        """
        path = self.path(root, hookpoint, shard)
        codec, shape = CODECS[manifest.identity.dtype], (rows, manifest.width(hookpoint))
        (extent,) = safetensors_file.locate(path, {_TENSOR: (shape, codec.storage, codec.tag)})
        return extent
