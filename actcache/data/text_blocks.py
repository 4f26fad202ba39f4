r"""Files of tokenised documents that the processes of one harvest exchange.

They are no part of a cache: a file that is missing or damaged is made again. All numbers are
little-endian. A file holds, without gaps:

    8 bytes   "actids1\n"
    5 int64   N pieces, T token ids in all, J bytes of JSON, number of documents read, whether the
              text ends here
    N int64   index of each piece's document in the seeded order
    N int64   index of its first token in that document
    N int64   number of its token ids
    J bytes   documents left out, as JSON: index, position in the block, what is wrong
    16 bytes  XXH3-128 of all of that
    16 bytes  XXH3-128 of the token ids
    T int32   the token ids

Letters: N pieces, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.data.records import Unusable
from actcache.data.sequences import Piece
from actcache.errors import FormatError
from actcache.filesystem.atomic import write_atomic

LeftOutOfBlock = Sequence[tuple[int, int, Unusable]]
_MAGIC = b"actids1\n"
_FIRST = len(_MAGIC) + 40  # bytes before the arrays of the header
_DIGESTS = 32


@dataclass(frozen=True)
class BlockHeader:
    """What a file holds, token ids apart."""

    documents: NDArray[np.int64]
    """[N]"""
    starts: NDArray[np.int64]
    """[N]"""
    lengths: NDArray[np.int64]
    """[N]"""
    count: int
    """Number of documents that were read, empty ones and those left out among them."""
    is_last: bool
    """Whether the text ends with this block."""
    left_out: LeftOutOfBlock = ()
    """As `BlockLeftOut.found`."""


def write_block(
    path: Path, pieces: Iterable[Piece], left_out: LeftOutOfBlock, count: int, *, is_last: bool
) -> tuple[BlockHeader, NDArray[np.int32]]:
    """Publish a block by atomic rename; return what `read_block` would.

    Raises:
        DiskFullError: there is no room for it.
    """
    found = list(pieces)
    fields = ([p.document for p in found], [p.start for p in found], [len(p.ids) for p in found])
    arrays = [np.array(field, dtype=np.int64) for field in fields]
    ids = np.concatenate([np.empty(0, "<i4"), *(p.ids.astype("<i4") for p in found)])
    bad = [[document, position, one.to_values()] for document, position, one in left_out]
    text = json.dumps(bad).encode()
    counts = np.array([len(found), len(ids), len(text), count, is_last], dtype="<i8")
    header = b"".join(
        [_MAGIC, counts.tobytes(), *(array.astype("<i8").tobytes() for array in arrays), text]
    )
    data = ids.tobytes()
    digests = [xxhash.xxh3_128_digest(part) for part in (header, data)]
    write_atomic(path, [header, *digests, data])
    return BlockHeader(arrays[0], arrays[1], arrays[2], count, is_last, tuple(left_out)), ids


def read_header(path: Path) -> BlockHeader | None:
    """Read a block without its token ids; None if it is missing or damaged."""
    found = _read(path, with_ids=False)
    return found and found[0]


def read_block(path: Path) -> tuple[BlockHeader, NDArray[np.int32]] | None:
    """Read a block and its token ids, [T]; None if it is missing or damaged."""
    return _read(path, with_ids=True)


def _read(path: Path, *, with_ids: bool) -> tuple[BlockHeader, NDArray[np.int32]] | None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(_FIRST)
            if len(first) < _FIRST or not first.startswith(_MAGIC):
                return None
            counts = np.frombuffer(first[len(_MAGIC) :], "<i8").tolist()
            pieces, tokens, text, count, is_last = counts
            long = 24 * pieces + text  # bytes
            if min(counts) < 0 or size != _FIRST + long + _DIGESTS + 4 * tokens:
                return None
            rest = file.read(long)
            digests = file.read(_DIGESTS)
            data = file.read(4 * tokens) if with_ids else b""
    except (OSError, FormatError):
        return None
    if xxhash.xxh3_128_digest(first + rest) != digests[:16]:
        return None
    documents, starts, lengths = np.frombuffer(rest, "<i8", 3 * pieces).reshape(3, pieces)
    if with_ids and xxhash.xxh3_128_digest(data) != digests[16:]:
        return None
    if (lengths < 0).any() or int(lengths.sum()) != tokens:
        return None
    left_out = tuple(
        (document, position, Unusable.from_values(values))
        for document, position, values in json.loads(rest[24 * pieces :])
    )
    header = BlockHeader(documents, starts, lengths, count, bool(is_last), left_out)
    return header, np.frombuffer(data, "<i4")
