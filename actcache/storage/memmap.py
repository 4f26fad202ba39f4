"""The memmap backend: one safetensors file per shard and hookpoint, tensor `activations`."""

from __future__ import annotations

from pathlib import Path

from actcache.atomic import FileReceipt
from actcache.storage import safetensors_file
from actcache.storage.codec import Array, Codec
from actcache.storage.safetensors_file import Extent

_TENSOR = "activations"


class MemmapBackend:
    """Rows of a shard as a self-describing file that any safetensors library can map."""

    def path(self, root: Path, hookpoint: str, shard: int) -> Path:
        """Where a shard's rows of one hookpoint lie."""
        return root / "activations" / hookpoint / f"{shard:05d}.safetensors"

    def write(
        self, root: Path, hookpoint: str, shard: int, rows: Array, codec: Codec
    ) -> FileReceipt:
        """Publish one shard's rows [rows, width], as stored."""
        path = self.path(root, hookpoint, shard)
        return safetensors_file.write(path, {_TENSOR: (rows, codec.tag)})

    def locate(
        self, root: Path, hookpoint: str, shard: int, shape: tuple[int, int], codec: Codec
    ) -> Extent:
        """Where the rows' bytes lie, checked against what is expected.

        Raises:
            CorruptShardError: the file is missing or has another shape, type or size.
        """
        path = self.path(root, hookpoint, shard)
        (extent,) = safetensors_file.locate(path, {_TENSOR: (shape, codec.storage, codec.tag)})
        return extent
