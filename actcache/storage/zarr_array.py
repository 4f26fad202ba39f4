"""The zarr backend: one Zarr v3 array per hookpoint, one chunk per shard.

`zarr.open` opens the arrays. Chunk files are written here and not by zarr-python, which leaves out
chunks of zeros, syncs nothing, and reads a chunk that is missing as zeros. An uncompressed chunk
file is its numbers and nothing else, so rows are read from it as from any other file.
"""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np

from actcache.atomic import FileReceipt, publish
from actcache.errors import CorruptShardError
from actcache.manifest import Manifest
from actcache.parse import to_json
from actcache.storage import blosc_chunk
from actcache.storage.blosc_chunk import CompressedExtent
from actcache.storage.codec import CODECS, Array
from actcache.storage.safetensors_file import Extent

DOCUMENT = "zarr.json"
_TYPES = {"bfloat16": ("uint16", 0), "float16": ("float16", 0.0), "float32": ("float32", 0.0)}
"""Zarr's type and fill value by ours: Zarr has no bfloat16."""


class ZarrBackend:
    """Rows of a shard as one chunk of the array [planned shards * shard rows, width]."""

    def path(self, root: Path, hookpoint: str, shard: int) -> Path:
        """Where a shard's rows of one hookpoint lie."""
        return _folder(root, hookpoint) / "c" / str(shard) / "0"

    def lay(self, root: Path, manifest: Manifest) -> None:
        """Write the arrays' `zarr.json`, which never changes, or check those that are there.

        Raises:
            CorruptShardError: one is there and is not this cache's.
            DiskFullError: no room.
        """
        for path, expected in self.documents(root, manifest).items():
            if path.exists() or path.is_symlink():
                _check_document(path, expected)
            else:
                publish(path, [expected])

    def documents(self, root: Path, manifest: Manifest) -> dict[Path, bytes]:
        """The `zarr.json` of every hookpoint."""
        return {
            _folder(root, h.name) / DOCUMENT: to_json(document(manifest, h.name))
            for h in manifest.identity.hookpoints
        }

    def write(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: Array
    ) -> FileReceipt:
        """Publish one shard's rows [rows, width], as stored, with zeros up to a whole chunk."""
        path = self.path(root, hookpoint, shard)
        missing = manifest.shard_rows - len(rows)
        padding = np.zeros((missing, rows.shape[1]), dtype=rows.dtype)
        if manifest.compression == "none":
            return publish(path, [part.reshape(-1).view(np.uint8).data for part in (rows, padding)])
        chunk = np.concatenate([rows, padding]) if missing else rows
        return publish(path, [blosc_chunk.encode(chunk)])

    def locate(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: int
    ) -> Extent | CompressedExtent:
        """Where the rows' bytes lie, checked against what is expected.

        Raises:
            CorruptShardError: `zarr.json` is not the manifest's, or the chunk is missing or has
                another size.
        """
        expected = to_json(document(manifest, hookpoint))
        _check_document(_folder(root, hookpoint) / DOCUMENT, expected)
        path = self.path(root, hookpoint, shard)
        size = _plain_size(path, (path, path.parent, path.parent.parent))
        if rows > manifest.shard_rows:
            raise _corrupt(path, f"at most {manifest.shard_rows} rows", f"{rows} in the receipt")
        codec, width = CODECS[manifest.identity.dtype], manifest.width(hookpoint)
        whole = Extent(path, 0, (manifest.shard_rows, width), codec.storage)
        if manifest.compression == "zstd":
            return blosc_chunk.locate(path, size, whole.bytes, (rows, width), codec.storage)
        if size != whole.bytes:
            raise _corrupt(path, f"{whole.bytes} bytes", f"{size} bytes")
        return Extent(path, 0, (rows, width), codec.storage)


def document(manifest: Manifest, hookpoint: str) -> dict[str, object]:
    """The `zarr.json` of one hookpoint: all of it follows from the manifest."""
    assert manifest.planned_sequences is not None  # the manifest's own rule for this backend
    shards = -(-manifest.planned_sequences // manifest.sequences_per_shard)
    width, dtype = manifest.width(hookpoint), manifest.identity.dtype
    data_type, fill_value = _TYPES[dtype]
    codecs: list[object] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if manifest.compression == "zstd":
        settings = blosc_chunk.ZARR_CODEC | {"typesize": CODECS[dtype].itemsize}
        codecs.append({"name": "blosc", "configuration": settings})
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [shards * manifest.shard_rows, width],
        "data_type": data_type,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [manifest.shard_rows, width]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": codecs,
        "attributes": {"actcache_dtype": dtype},
    }


def _folder(root: Path, hookpoint: str) -> Path:
    return root / "activations" / hookpoint


def _check_document(path: Path, expected: bytes) -> None:
    # Byte for byte: nothing is parsed that might say another thing to another parser.
    size = _plain_size(path, (path,))
    if size != len(expected) or path.read_bytes() != expected:
        raise _corrupt(path, f"the {len(expected)} bytes that follow from the manifest", "others")


def _plain_size(path: Path, links: tuple[Path, ...]) -> int:
    """Size of a plain file; none of `links` may be a symbolic link."""
    for link in links:
        if link.is_symlink():
            raise _corrupt(path, "plain files and folders", f"{link} is a symbolic link")
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _corrupt(path, "a file", "nothing") from error
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise _corrupt(path, "a plain file", "a folder or a device")
    return found.st_size


def _corrupt(path: Path, expected: object, got: object) -> CorruptShardError:
    remedy = "actcache verify CACHE --repair, or restore a copy"
    if path.name == DOCUMENT:
        remedy = "delete it and run the same actcache harvest command again: it is written anew"
    return CorruptShardError(
        f"{path} is not the file that the manifest and receipt promise",
        expected=expected,
        got=got,
        remedy=remedy,
    )
