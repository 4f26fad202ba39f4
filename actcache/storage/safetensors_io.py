"""Safetensors files as this project writes and trusts them.

Written by hand, because the data must be reserved, synced and renamed (see `atomic`), and because
it begins on a 4096-byte boundary here, so that whole blocks can be read without a copy. The header
is padded with spaces, which the format allows; any safetensors library opens the files.
Read by hand, because every number in the header is checked against what the manifest promises
before a byte of data is touched.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
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
    """Where the bytes of one tensor lie."""

    path: CachePath
    offset: int
    """Bytes from the beginning of the file."""
    shape: tuple[int, ...]
    storage: str
    """NumPy type of the bytes."""

    @property
    def bytes(self) -> int:
        """Length, bytes."""
        # Not np.prod: a shape from a hostile file may pass 2^63.
        return math.prod(self.shape) * np.dtype(self.storage).itemsize


def write(path: Path, tensors: Mapping[str, tuple[Array, str | None]]) -> FileDigest:
    """Publish tensors as one safetensors file.

    Args:
        path: final name.
        tensors: name to (C-contiguous little-endian array, safetensors tag or None for the
            array's own type).
    """
    specs: dict[str, Spec] = {}
    for name, (array, tag) in tensors.items():
        assert array.flags.c_contiguous
        storage = _little(array.dtype)
        specs[name] = (array.shape, storage, tag or _TAGS[storage])
    parts = [array.reshape(-1).view(np.uint8).data for array, _ in tensors.values()]
    return write_atomic(path, [_header(specs), *parts])


def size(tensors: Mapping[str, Spec]) -> int:
    """Bytes of the file that `write` would make of such tensors."""
    return len(_header(tensors)) + sum(_bytes(spec) for spec in tensors.values())


def _header(tensors: Mapping[str, Spec]) -> bytes:
    """Length and JSON header, with spaces up to where the data begins."""
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
    """Find tensors whose shapes and types are known beforehand.

    Args:
        path: the file.
        expected: all that the file may hold, in the order of the bytes.

    Raises:
        CorruptShardError: the file is missing, or anything in its header or its size differs.
    """
    try:
        if path.is_symlink():
            raise _corrupt(path, "a plain file", "a symbolic link")
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
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


def read(extent: TensorExtent) -> Array:
    """The whole tensor, in memory of its own."""
    with _opened(extent.path) as file:
        file.seek(extent.offset)
        data = file.read(extent.bytes)
    if len(data) != extent.bytes:
        raise _corrupt(extent.path, f"{extent.bytes} bytes of data", f"{len(data)}")
    array: Array = np.frombuffer(data, dtype=extent.storage).reshape(extent.shape).copy()
    return array


def _opened(path: CachePath) -> BinaryIO:
    return path.open("rb") if isinstance(path, Path) else require_remote(path).open()


def _little(dtype: np.dtype[np.generic]) -> str:
    return dtype.newbyteorder("<").str


def _corrupt(path: CachePath, expected: object, got: object) -> CorruptShardError:
    return CorruptShardError(
        f"{path} is not the file that its receipt promises",
        expected=expected,
        got=got if isinstance(got, str) else truncated_repr(got, 300),
        remedy="actcache verify CACHE --repair, or restore a copy",
    )


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
            f"{VALUES}/{h.name}": size(_tensors(manifest, h.name, rows))
            for h in manifest.identity.hookpoints
        }

    def write(
        self, root: Path, manifest: Manifest, hookpoint: str, shard: int, rows: StoredRows
    ) -> dict[str, FileDigest]:
        """Publish one shard's rows of one hookpoint."""
        parts = ROW_DTYPES[manifest.identity.dtype].parts(manifest.width(hookpoint))
        tensors = {name: (rows.parts[name], part.tag) for name, part in parts.items()}
        path = self.path(root, hookpoint, shard)
        return {f"{VALUES}/{hookpoint}": write(path, tensors)}

    def locate(
        self, root: CachePath, manifest: Manifest, hookpoint: str, shard: int, rows: int, part: str
    ) -> TensorExtent:
        """Where the bytes of one part of the rows lie, checked against what is expected.

        Raises:
            CorruptShardError: the file is missing or has another shape, type or size.
        """
        path, expected = self.path(root, hookpoint, shard), _tensors(manifest, hookpoint, rows)
        extents = locate(path, expected)
        return extents[list(expected).index(part)]


def _tensors(manifest: Manifest, hookpoint: str, rows: int) -> dict[str, Spec]:
    parts = ROW_DTYPES[manifest.identity.dtype].parts(manifest.width(hookpoint))
    return {name: ((rows, *part.shape), part.storage, part.tag) for name, part in parts.items()}
