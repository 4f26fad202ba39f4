"""Chunks compressed by blosc (zstd level 1 over shuffled bytes, blocks of 512 KiB), read in parts.

A blosc buffer is a header of 16 bytes, the offset of every block (uint32), and the blocks, each of
which can be decoded alone. `ActivationStream` reads runs of about 1 MiB at random from chunks of up
to 2 GiB, so decoding whole chunks would waste time or memory. A read fetches only the blocks it
needs, puts a header before them that makes them a valid blosc buffer, and decodes that. It decodes
at most two blocks too many and holds at most `_PIECE` decoded and as many encoded bytes.
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
"""Decoded bytes of a block, unless the chunk is smaller. Smaller blocks compress less and more
slowly; larger ones waste decoding around a run of 1 MiB."""

MAX_BYTES = 2**31 - 1 - 16
"""Largest number of decoded bytes of a chunk in blosc's format."""

ZARR_CODEC = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": BLOCK}
"""Codec configuration in `zarr.json`, without the item size."""

_PIECE = 8 * BLOCK
_HEADER = struct.Struct("<BBBBIII")  # version, zstd's, flags, itemsize, decoded, block, encoded
_VERSIONS = (2, 1)
_FLAGS = 4 << 5 | 0x10 | 0x01  # zstd, blocks in one piece, bytes shuffled
_STORED = 0x02  # incompressible: the bytes follow the header as they are


@dataclass(frozen=True, eq=False)
class CompressedExtent:
    """Location of the blocks of a compressed chunk, and the shape of the rows it begins with."""

    path: CachePath
    shape: tuple[int, ...]
    """Shape of the rows; padding may follow them in the chunk."""
    storage: str
    """NumPy type of the rows."""
    decoded: int
    """Decoded bytes of the whole chunk."""
    starts: NDArray[np.int64]
    """Offset of every block in the file, then the file's size. [blocks + 1]"""

    @property
    def bytes(self) -> int:
        """Decoded bytes of the rows."""
        return math.prod(self.shape) * np.dtype(self.storage).itemsize

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with decoded bytes from `offset` on; raises `CorruptShardError`."""
        while view:
            start = offset // BLOCK * BLOCK
            stop = min(start + _PIECE, -(-(offset + len(view)) // BLOCK) * BLOCK, self.decoded)
            n = min(len(view), stop - offset)
            piece = self._decode(start, stop)
            view[:n] = piece[offset - start : offset - start + n].data
            view, offset = view[n:], offset + n

    def _decode(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Decode bytes [start, stop), which are whole blocks."""
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
    """Compress a chunk; the result depends on its bytes and the blosc version only."""
    assert chunk.nbytes <= MAX_BYTES
    blosc = _blosc()
    try:
        encoded: bytes = blosc.compress(chunk, b"zstd", 1, 1, BLOCK)
    except RuntimeError as error:  # the only failure of blosc for a chunk that is not too large
        raise MemoryError(f"blosc cannot compress {chunk.nbytes:,} bytes: {error}") from error
    return encoded


def locate(
    path: CachePath, size: int, decoded: int, shape: tuple[int, ...], storage: str
) -> TensorExtent | CompressedExtent:
    """Locate a chunk's blocks, or its rows if blosc stored them uncompressed.

    Args:
        path: a plain file.
        size: its size, bytes.
        decoded: expected decoded size of the chunk, bytes.
        shape: shape of the rows that the chunk begins with.
        storage: NumPy type of the rows.

    Raises:
        CorruptShardError: the header or the offsets do not fit such a chunk.
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
    if size < first:  # check before allocating memory for the offsets
        raise _corrupt(path, f"at least {first} bytes", f"{size} bytes")
    index = np.empty(count, dtype="<u4")
    read_exactly(path, index.view(np.uint8).data, _HEADER.size)
    starts = np.append(index.astype(np.int64), size)
    lengths = np.diff(starts)
    # A block that zstd cannot compress is stored as its length (uint32) and its bytes.
    if starts[0] != first or lengths.min() <= 0 or lengths.max() > BLOCK + 4:
        raise _corrupt(path, f"blocks without gaps from byte {first} on", "other offsets")
    return CompressedExtent(path, shape, storage, decoded, starts)


def _blosc() -> Any:
    """Import numcodecs on demand, since only compressed caches need it."""
    from numcodecs import blosc

    blosc.use_threads = False  # with threads, the order of blocks in the file would vary
    return blosc


def _corrupt(path: CachePath, expected: object, got: object) -> CorruptShardError:
    return CorruptShardError(
        f"{path} is not the compressed chunk that its receipt describes",
        expected=expected,
        got=got,
        remedy="actcache verify CACHE --repair, or restore a copy",
    )
