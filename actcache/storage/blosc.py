"""Chunks compressed by blosc: zstd at level 1 over shuffled bytes, in blocks of 512 KiB.

A blosc buffer is a header of 16 bytes, the offset of every block (uint32), and the blocks, each of
which can be decoded alone. `ActivationStream` reads runs of about 1 MiB at random, and a chunk may
have 2 GiB: decoding whole chunks would do a chunk's work for each run, or keep many in memory. So a
reader fetches only the blocks that it needs, puts a header before them that makes them a blosc
buffer of their own, and decodes that. A read costs at most two blocks more than was asked for, and
holds at most `_PIECE` decoded and as much encoded bytes, whatever the size of the chunk.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError
from actcache.filesystem.paths import CachePath
from actcache.format.dtypes import Array
from actcache.storage.preadv import read_exactly
from actcache.storage.safetensors_io import TensorExtent

BLOCK = 1 << 19
"""Decoded bytes of a block, unless the whole chunk has fewer. Smaller ones compress less and more
slowly; of larger ones, too much is decoded in vain around a run of 1 MiB."""

MAX_BYTES = 2**31 - 1 - 16
"""Decoded bytes of a chunk: blosc counts no further."""

ZARR_CODEC = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": BLOCK}
"""What `zarr.json` says of it, besides the size of a number."""

_PIECE = 8 * BLOCK
_HEADER = struct.Struct("<BBBBIII")  # version, zstd's, flags, itemsize, decoded, block, encoded
_VERSIONS = (2, 1)
_FLAGS = 4 << 5 | 0x10 | 0x01  # zstd, blocks in one piece, bytes shuffled
_STORED = 0x02  # incompressible: the bytes follow the header as they are


@dataclass(frozen=True, eq=False)
class CompressedExtent:
    """Where the blocks of a compressed chunk lie, and how much of it is rows."""

    path: CachePath
    shape: tuple[int, ...]
    """Of the rows; the chunk may go on after them."""
    storage: str
    """NumPy type of the rows."""
    decoded: int
    """Bytes of the whole chunk, decoded."""
    starts: NDArray[np.int64]
    """Offset of every block in the file, then the file's size. [blocks + 1]"""

    @property
    def bytes(self) -> int:
        """Length of the rows, decoded, bytes."""
        return math.prod(self.shape) * np.dtype(self.storage).itemsize

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with decoded bytes from `offset` on.

        Raises:
            CorruptShardError: the file is gone, ends early, or cannot be decoded.
        """
        while view:
            start = offset // BLOCK * BLOCK
            stop = min(start + _PIECE, -(-(offset + len(view)) // BLOCK) * BLOCK, self.decoded)
            n = min(len(view), stop - offset)
            piece = self._decode(start, stop)
            view[:n] = piece[offset - start : offset - start + n].data
            view, offset = view[n:], offset + n

    def _decode(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Decoded bytes [start, stop), which are whole blocks."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        begin, end = int(self.starts[first]), int(self.starts[last])
        blocks = _HEADER.size + 4 * (last - first)
        buffer = np.empty(blocks + end - begin, dtype=np.uint8)
        size, itemsize = stop - start, np.dtype(self.storage).itemsize
        header = _HEADER.pack(*_VERSIONS, _FLAGS, itemsize, size, min(BLOCK, size), len(buffer))
        index = (self.starts[first:last] - begin + blocks).astype("<u4")
        buffer[:blocks] = np.frombuffer(header + index.tobytes(), dtype=np.uint8)
        read_exactly(self.path, buffer[blocks:].data, begin)
        decoded = np.empty(size, dtype=np.uint8)
        try:
            _blosc().decompress(buffer, decoded)
        except (RuntimeError, ValueError) as error:
            raise _corrupt(self.path, "blocks that blosc decodes", error) from error
        return decoded


def encode(chunk: Array) -> bytes:
    """A whole chunk as one blosc buffer; a function of its bytes and of the blosc library."""
    assert chunk.nbytes <= MAX_BYTES
    encoded: bytes = _blosc().compress(chunk, b"zstd", 1, 1, BLOCK)
    return encoded


def locate(
    path: CachePath, size: int, decoded: int, shape: tuple[int, ...], storage: str
) -> TensorExtent | CompressedExtent:
    """Where a compressed chunk's blocks lie, or its rows if blosc found nothing to compress.

    Args:
        path: a plain file.
        size: its size, bytes.
        decoded: what the chunk must have decoded, bytes.
        shape: of the rows that it begins with.
        storage: NumPy type of the rows.

    Raises:
        CorruptShardError: header or offsets are not those of such a chunk.
    """
    itemsize = np.dtype(storage).itemsize
    if size < _HEADER.size:
        raise _corrupt(path, f"at least {_HEADER.size} bytes", f"{size} bytes")
    head = bytearray(_HEADER.size)
    read_exactly(path, memoryview(head), 0)
    found = _HEADER.unpack(head)
    stored = (*_VERSIONS, _FLAGS | _STORED, itemsize, decoded, min(BLOCK, decoded), size)
    if found == stored and size == _HEADER.size + decoded:
        return TensorExtent(path, _HEADER.size, shape, storage)
    want = (*_VERSIONS, _FLAGS, itemsize, decoded, min(BLOCK, decoded), size)
    if found != want:
        raise _corrupt(path, f"a blosc header {want}", found)
    count = -(-decoded // BLOCK)
    first = _HEADER.size + 4 * count
    if size < first:  # before memory is taken for as many offsets
        raise _corrupt(path, f"at least {first} bytes", f"{size} bytes")
    index = np.empty(count, dtype="<u4")
    read_exactly(path, index.view(np.uint8).data, _HEADER.size)
    starts = np.append(index.astype(np.int64), size)
    lengths = np.diff(starts)
    # A block that zstd cannot shorten is stored: its length (uint32), then its bytes.
    if starts[0] != first or lengths.min() <= 0 or lengths.max() > BLOCK + 4:
        raise _corrupt(path, f"blocks without gaps from byte {first} on", "other offsets")
    return CompressedExtent(path, shape, storage, decoded, starts)


def _blosc() -> Any:
    """Imported late: only compressed caches need it."""
    from numcodecs import blosc

    blosc.use_threads = False  # threads finish blocks in any order, and the bytes would vary
    return blosc


def _corrupt(path: CachePath, expected: object, got: object) -> CorruptShardError:
    return CorruptShardError(
        f"{path} is not the compressed chunk that its receipt promises",
        expected=expected,
        got=got,
        remedy="actcache verify CACHE --repair, or restore a copy",
    )
