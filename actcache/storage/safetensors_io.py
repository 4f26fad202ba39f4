"""Safetensors files, and the memmap backend, which stores rows in them.

Files are published by `write_atomic`. Their data begins on a 4096-byte boundary, so that whole
blocks can be read without a copy; the header is padded with spaces, which the format allows, so any
safetensors library opens them. On reading, the whole header is compared with the one expected from
the manifest before any data is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from actcache.core.json_codec import decode_json, truncated_repr
from actcache.errors import CorruptShardError
from actcache.filesystem.atomic import FileDigest, write_atomic
from actcache.filesystem.paths import CachePath, CachePathT, require_remote
from actcache.format.dtypes import ROW_DTYPES, VALUES, Array, StoredRows
from actcache.format.manifest import Manifest

ALIGNMENT = 4096
Spec = tuple[tuple[int, ...], str, str]
"""Description of a tensor: (shape, NumPy type, safetensors tag)."""

_MAX_HEADER = 1 << 20
_TAGS = {"<u2": "U16", "<i4": "I32", "<i8": "I64", "<f2": "F16", "<f4": "F32", "<f8": "F64"}


@dataclass(frozen=True)
class TensorExtent:
    """Location of the bytes of one tensor in a file."""

    path: CachePath
    offset: int
    """Bytes from the beginning of the file."""
    shape: tuple[int, ...]
    storage: str
    """NumPy type of the bytes."""

    @property
    def bytes(self) -> int:
        """Length, bytes."""
        # Not np.prod: a shape from a hostile file may exceed 2^63.
        return math.prod(self.shape) * np.dtype(self.storage).itemsize


def write(path: Path, tensors: Mapping[str, tuple[Array, str | None]]) -> FileDigest:
    """Publish tensors as one safetensors file.

    Args:
        path: path of the file.
        tensors: name to (C-contiguous little-endian array, safetensors tag or None for the
            array's own type).
    """
    specs: dict[str, Spec] = {}
    for name, (array, tag) in tensors.items():
        assert array.flags.c_contiguous
        storage = array.dtype.newbyteorder("<").str
        specs[name] = (array.shape, storage, tag or _TAGS[storage])
    parts = [array.reshape(-1).view(np.uint8).data for array, _ in tensors.values()]
    return write_atomic(path, [_header(specs), *parts])


def size(tensors: Mapping[str, Spec]) -> int:
    """Compute the bytes of the file that `write` creates for such tensors."""
    return len(_header(tensors)) + sum(_bytes(spec) for spec in tensors.values())


def _header(tensors: Mapping[str, Spec]) -> bytes:
    """Encode the header's length and JSON, padded with spaces to `ALIGNMENT`."""
    header: dict[str, object] = {}
    end = 0
    for name, spec in tensors.items():
        begin, end = end, end + _bytes(spec)
        shape, _, tag = spec
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _bytes(spec: Spec) -> int:
    shape, storage, _ = spec
    return math.prod(shape) * np.dtype(storage).itemsize


def locate(path: CachePath, expected: Mapping[str, Spec]) -> list[TensorExtent]:
    """Locate tensors whose shapes and types are known.

    Args:
        path: the file.
        expected: all tensors of the file, in the order of the bytes.

    Raises:
        CorruptShardError: the file is missing, or its header or size differs.
    """
    try:
        if path.is_symlink():
            raise _corrupt(path, "a plain file", "a symbolic link")
        if path.exists() and not path.is_file():  # opening a pipe would block for ever
            raise _corrupt(path, "a plain file", "a folder or a device")
        with _opened(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise _corrupt(path, "a header length", length)
            header = decode_json(file.read(length))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _corrupt(path, "a file", "nothing") from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "a JSON header", truncated_repr(str(error), 300)) from error
    want: dict[str, object] = {}
    extents = []
    offset = 8 + length
    for name, (shape, storage, tag) in expected.items():
        extent = TensorExtent(path, offset, shape, storage)
        begin = offset - 8 - length
        offsets = [begin, begin + extent.bytes]
        want[name] = {"dtype": tag, "shape": list(shape), "data_offsets": offsets}
        extents.append(extent)
        offset += extent.bytes
    if header != want:
        raise _corrupt(path, want, header)
    if size != offset:
        raise _corrupt(path, f"{offset} bytes", f"{size} bytes")
    return extents


def read(extents: Iterable[TensorExtent]) -> list[Array]:
    """Read whole tensors of one file into new memory."""
    first, *_ = extents = list(extents)
    path, arrays = first.path, []
    with _opened(path) as file:
        for extent in extents:
            file.seek(extent.offset)
            data = file.read(extent.bytes)
            if len(data) != extent.bytes:
                raise _corrupt(path, f"{extent.bytes} bytes of data", f"{len(data)}")
            arrays.append(np.frombuffer(data, extent.storage).reshape(extent.shape).copy())
    return arrays


def _opened(path: CachePath) -> BinaryIO:
    return path.open("rb") if isinstance(path, Path) else require_remote(path).open()


def _corrupt(path: CachePath, expected: object, got: object) -> CorruptShardError:
    return CorruptShardError(
        f"{path} is not the file that its receipt describes",
        expected=expected,
        got=got if isinstance(got, str) else truncated_repr(got, 300),
        remedy="actcache verify CACHE --repair, or restore a copy",
    )


class MemmapBackend:
    """One safetensors file per shard and hookpoint, which any safetensors library can map.

    Its tensors are `activations` and, for 8-bit rows, `scales`.
    """

    def path(self, root: CachePathT, hookpoint: str, shard: int) -> CachePathT:
        """Return the file of a shard's rows of one hookpoint."""
        return root / "activations" / hookpoint / f"{shard:05d}.safetensors"

    def initialize(self, root: Path, manifest: Manifest) -> None:
        """Do nothing: there are no metadata files."""

    def metadata_files(
        self,
        root: CachePathT,  # noqa: ARG002
        manifest: Manifest,  # noqa: ARG002
    ) -> dict[CachePathT, tuple[bytes, ...]]:
        """Return no files, since every file describes itself."""
        return {}

    def files(self, root: CachePathT, manifest: Manifest, shard: int) -> dict[str, CachePathT]:
        """Return the files of a shard's rows, by their logical names in the receipt."""
        names = (hookpoint.name for hookpoint in manifest.identity.hookpoints)
        return {f"{VALUES}/{name}": self.path(root, name, shard) for name in names}

    def sizes(self, manifest: Manifest, rows: int) -> dict[str, int]:
        """Compute the bytes of a shard's files, by the names of `files`."""
        return {
            f"{VALUES}/{h.name}": size(_tensors(manifest, h.width, rows))
            for h in manifest.identity.hookpoints
        }

    def write(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: StoredRows
    ) -> dict[str, FileDigest]:
        """Write one shard's rows of one hookpoint; return digests by the names of `files`."""
        parts = ROW_DTYPES[manifest.identity.dtype].parts(manifest.width(hookpoint))
        tensors = {name: (rows.parts[name], part.tag) for name, part in parts.items()}
        path = self.path(root, hookpoint, shard)
        return {f"{VALUES}/{hookpoint}": write(path, tensors)}

    def locate(
        self, root: CachePath, manifest: Manifest, hookpoint: str, shard: int, rows: int, part: str
    ) -> TensorExtent:
        """Locate one component of the rows, checking the whole file's header and size.

        Raises:
            CorruptShardError: the file is missing or has another shape, type or size.
        """
        path, expected = (
            self.path(root, hookpoint, shard),
            _tensors(manifest, manifest.width(hookpoint), rows),
        )
        extents = locate(path, expected)
        return extents[list(expected).index(part)]


def _tensors(manifest: Manifest, width: int, rows: int) -> dict[str, Spec]:
    parts = ROW_DTYPES[manifest.identity.dtype].parts(width)
    return {name: ((rows, *part.shape), part.storage, part.tag) for name, part in parts.items()}
