"""Which token each row of a stream is: its id, its sequence in the whole harvest, its position."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.cache.reader import Cache
from actcache.stream.order import Rows

TEXT_BYTES = 2**28
"""Of text that is kept in memory, unless said otherwise."""


@dataclass(frozen=True)
class RowTokens:
    """The tokens that some rows are. n rows."""

    tokens: Rows
    """Token ids. [n]"""
    sequences: Rows
    """Sequences, numbered through the whole harvest. [n]"""
    positions: Rows
    """Positions within their sequences. [n]"""


class RowTokenReader:
    """Looks rows up in the shards' tokens files, which are read when first needed, and checked.

    Shards used last stay in memory, 12 bytes a row, up to a limit; at least one always does. A
    batch has rows of many shards: where the text of all of them together is larger than the limit,
    it is read over and over, and slows the stream down.

    Args:
        cache: where the text is; its receipts may grow.
        limit: bytes of text to keep.
    """

    def __init__(self, cache: Cache, limit: int = TEXT_BYTES) -> None:
        self._cache, self._limit = cache, limit
        self._kept: OrderedDict[int, NDArray[np.int32]] = OrderedDict()  # oldest use first
        self._bytes = 0
        self._lock = threading.Lock()

    def of(self, addresses: Rows) -> RowTokens:
        """The tokens that rows are, by their (shard, row in shard). [n, 2]

        Raises:
            CorruptShardError: a tokens file is missing or is not what the receipt promises.
        """
        found = np.empty((3, len(addresses)), dtype=np.int64)
        shards, rows = addresses.T
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            with self._lock:
                table = self._shard(int(shard))
            found[:, here] = table[rows[here]].T
            # Within the shard as kept; in 10^10 sequences the number would not fit 32 bits.
            found[1, here] += self._cache.receipts[int(shard)].first_sequence
        return RowTokens(*found)

    def _shard(self, shard: int) -> NDArray[np.int32]:
        if shard not in self._kept:
            words = self._cache.tokens(shard)
            where = words.row_sequence, words.row_position
            table = np.stack([words.tokens[where], *where], axis=1)  # [N, 3]
            while self._kept and self._bytes + table.nbytes > self._limit:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.nbytes
            self._kept[shard] = table
            self._bytes += table.nbytes
        self._kept.move_to_end(shard)
        return self._kept[shard]
