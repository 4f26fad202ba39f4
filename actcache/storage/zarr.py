"""The zarr backend: one Zarr v3 array per hookpoint, one chunk per shard.

`zarr.open` opens the arrays. Chunks are not written by zarr-python, which omits chunks of zeros,
does not sync, and reads a missing chunk as zeros. An uncompressed chunk file consists of the values
alone. Scales of 8-bit rows are a one-dimensional array under `scales/`, never compressed.
"""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np

from actcache.core.json_codec import to_json
from actcache.errors import CorruptShardError
from actcache.filesystem.atomic import FileDigest, write_atomic
from actcache.filesystem.paths import CachePath, CachePathT
from actcache.format.dtypes import ROW_DTYPES, VALUES, RowComponent, StoredRows
from actcache.format.manifest import Manifest, read_manifest
from actcache.storage import blosc
from actcache.storage.blosc import CompressedExtent
from actcache.storage.safetensors_io import TensorExtent

DOCUMENT = "zarr.json"


class ZarrBackend:
    """Rows of a shard as one chunk of the array [planned shards * shard rows, width]."""

    def path(self, root: CachePathT, hookpoint: str, shard: int) -> CachePathT:
        """Return the file of the values of a shard's rows of one hookpoint."""
        return _chunk(_folder(root, hookpoint, VALUES), shard, 2)

    def files(self, root: CachePathT, manifest: Manifest, shard: int) -> dict[str, CachePathT]:
        """Return the files of a shard's rows, by their logical names in the receipt."""
        return {
            f"{part}/{h.name}": _chunk(_folder(root, h.name, part), shard, 1 + len(each.shape))
            for h in manifest.identity.hookpoints
            for part, each in _parts(manifest, h.name).items()
        }

    def initialize(self, root: Path, manifest: Manifest) -> None:
        """Write missing `zarr.json` files, check the others, and rewrite them after an extension.

        Raises:
            CorruptShardError: an existing file is not this cache's.
            DiskFullError: the disk is full.
        """
        for path, accepted in self.metadata_files(root, manifest).items():
            exists = path.exists() or path.is_symlink()
            if not exists or _check_document(path, accepted) != accepted[-1]:
                write_atomic(path, [accepted[-1]])

    def metadata_files(
        self, root: CachePathT, manifest: Manifest
    ) -> dict[CachePathT, tuple[bytes, ...]]:
        """Return the `zarr.json` files with their accepted contents, oldest first.

        There is one content for the first manifest and one per extension, since a crash can leave
        an older version. The last one is current.
        """
        return {
            _folder(root, h.name, part) / DOCUMENT: _documents(manifest, h.name, part)
            for h in manifest.identity.hookpoints
            for part in _parts(manifest, h.name)
        }

    def sizes(self, manifest: Manifest, rows: int) -> dict[str, int]:  # noqa: ARG002
        """Compute the uncompressed bytes of a shard's whole chunks, by the names of `files`."""
        return {
            f"{part}/{h.name}": manifest.shard_rows * each.bytes
            for h in manifest.identity.hookpoints
            for part, each in _parts(manifest, h.name).items()
        }

    def write(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: StoredRows
    ) -> dict[str, FileDigest]:
        """Write one shard's rows of one hookpoint, padded with zeros to whole chunks."""
        receipts = {}
        for part, array in rows.parts.items():
            path = _chunk(_folder(root, hookpoint, part), shard, array.ndim)
            missing = manifest.shard_rows - len(array)
            padding = np.zeros((missing, *array.shape[1:]), dtype=array.dtype)
            pieces: list[memoryview | bytes]
            if _compressed(manifest, part):
                chunk = np.concatenate([array, padding]) if missing else array
                pieces = [blosc.encode(chunk)]
            else:
                pieces = [piece.reshape(-1).view(np.uint8).data for piece in (array, padding)]
            receipts[f"{part}/{hookpoint}"] = write_atomic(path, pieces)
        return receipts

    def locate(
        self, root: CachePath, manifest: Manifest, hookpoint: str, shard: int, rows: int, part: str
    ) -> TensorExtent | CompressedExtent:
        """Locate one component of the rows, checking `zarr.json` and the chunk's size.

        An extension that is newer than `manifest` may have lengthened the array.

        Raises:
            CorruptShardError: `zarr.json` does not fit the manifest, or the chunk is missing or
                has another size.
        """
        folder, each = _folder(root, hookpoint, part), _parts(manifest, hookpoint)[part]
        _check_live_document(root, folder / DOCUMENT, manifest, hookpoint, part)
        path = _chunk(folder, shard, 1 + len(each.shape))
        size = _plain_size(path, (path, *(p for p in path.parents if folder in p.parents)))
        if rows > manifest.shard_rows:
            raise _corrupt(path, f"at most {manifest.shard_rows} rows", f"{rows} in the receipt")
        shape = (rows, *each.shape)
        whole = TensorExtent(path, 0, (manifest.shard_rows, *each.shape), each.storage)
        if _compressed(manifest, part):
            return blosc.locate(path, size, whole.bytes, shape, each.storage)
        if size != whole.bytes:
            raise _corrupt(path, f"{whole.bytes} bytes", f"{size} bytes")
        return TensorExtent(path, 0, shape, each.storage)


def document(manifest: Manifest, hookpoint: str, part: str = VALUES) -> dict[str, object]:
    """Build the `zarr.json` of one array from the manifest."""
    shards = manifest.plan.shards
    assert shards is not None  # checked by the manifest for this backend
    each = _parts(manifest, hookpoint)[part]
    number = np.dtype(each.storage)
    order = {"configuration": {"endian": "little"}} if number.itemsize > 1 else {}
    codecs: list[object] = [{"name": "bytes"} | order]
    if _compressed(manifest, part):
        settings = blosc.ZARR_CODEC | {"typesize": number.itemsize}
        codecs.append({"name": "blosc", "configuration": settings})
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [shards * manifest.shard_rows, *each.shape],
        "data_type": number.name,  # bfloat16 and float8_e4m3 as integers: Zarr has no such types
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [manifest.shard_rows, *each.shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if number.kind == "f" else 0,
        "codecs": codecs,
        "attributes": {"actcache_dtype": manifest.identity.dtype if part == VALUES else "float32"},
    }


def _parts(manifest: Manifest, hookpoint: str) -> dict[str, RowComponent]:
    return ROW_DTYPES[manifest.identity.dtype].parts(manifest.width(hookpoint))


def _compressed(manifest: Manifest, part: str) -> bool:
    return manifest.compression == "zstd" and part == VALUES


def _folder(root: CachePathT, hookpoint: str, part: str) -> CachePathT:
    return root / part / hookpoint


def _chunk(folder: CachePathT, shard: int, dimensions: int) -> CachePathT:
    """Return the file of a shard's chunk, which covers the whole width of the array."""
    return folder.joinpath("c", str(shard), *["0"] * (dimensions - 1))


def _documents(manifest: Manifest, hookpoint: str, part: str) -> tuple[bytes, ...]:
    """Return the accepted contents of one array's `zarr.json`, without and with extensions."""
    versions = (manifest.truncated_to(number) for number in range(len(manifest.extensions) + 1))
    return tuple(to_json(document(version, hookpoint, part)) for version in versions)


def _check_document(path: CachePath, accepted: tuple[bytes, ...]) -> bytes:
    """Return the content of a `zarr.json` if it is accepted; raises `CorruptShardError`."""
    # Compared byte for byte, so that no parser can interpret it differently.
    size = _plain_size(path, (path,))
    found = path.read_bytes() if size in map(len, accepted) else b""
    if found not in accepted:
        expected = f"the {len(accepted[-1])} bytes that follow from the manifest"
        raise _corrupt(path, expected, "other bytes")
    return found


def _check_live_document(
    root: CachePath, path: CachePath, manifest: Manifest, hookpoint: str, part: str
) -> None:
    """Check a `zarr.json` that a harvest may rewrite meanwhile, when it extends the cache."""
    while True:
        try:
            _check_document(path, _documents(manifest, hookpoint, part))
        except CorruptShardError:
            later = read_manifest(root)
            if later == manifest or later.truncated_to(len(manifest.extensions)) != manifest:
                raise
            manifest = later
        else:
            return


def _plain_size(path: CachePath, links: tuple[CachePath, ...]) -> int:
    """Return the size of a plain file; none of the paths `links` may be a symbolic link."""
    for link in links:
        if link.is_symlink():
            raise _corrupt(path, "plain files and folders", f"{link} is a symbolic link")
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _corrupt(path, "a file", "nothing") from error
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would block for ever
        raise _corrupt(path, "a plain file", "a folder or a device")
    return found.st_size


def _corrupt(path: CachePath, expected: object, got: object) -> CorruptShardError:
    remedy = "actcache verify CACHE --repair, or restore a copy"
    if path.name == DOCUMENT:
        remedy = "delete it and run the same actcache harvest command again, which rewrites it"
    return CorruptShardError(
        f"{path} is not the file that the manifest and receipt describe",
        expected=expected,
        got=got,
        remedy=remedy,
    )
