"""Tokens of a stream's rows: id, sequence number in the whole harvest, and position."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.cache.reader import Cache
from actcache.stream.order import Rows

TEXT_BYTES = 2**28
"""Default limit of token tables that are kept in memory."""


@dataclass(frozen=True)
class RowTokens:
    """Tokens of n rows."""

    tokens: Rows
    """Token ids. [n]"""
    sequences: Rows
    """Sequence numbers, counted over the whole harvest. [n]"""
    positions: Rows
    """Positions within their sequences. [n]"""


class RowTokenReader:
    """Reader of rows' tokens from the shards' tokens files, which are verified when first read.

    An LRU cache keeps the tables of shards, 12 bytes a row, up to a limit; at least one is kept.
    A batch has rows of many shards: if their tables exceed the limit together, they are read again
    and again, which slows the stream down.

    Args:
        cache: source of the tokens; its receipts may grow.
        limit: bytes of tables to keep.
    """

    def __init__(self, cache: Cache, limit: int = TEXT_BYTES) -> None:
        self._cache, self._limit = cache, limit
        self._kept: OrderedDict[int, NDArray[np.int32]] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._lock = threading.Lock()

    def of(self, addresses: Rows) -> RowTokens:
        """Look up the tokens of rows by their addresses (shard, row in shard). [n, 2]

        Raises:
            CorruptShardError: a tokens file is missing or does not match its receipt.
        """
        found = np.empty((3, len(addresses)), dtype=np.int64)
        shards, rows = addresses.T
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            with self._lock:
                table = self._shard(int(shard))
            found[:, here] = table[rows[here]].T
            # Tables count from the shard's first sequence: 10^10 sequences do not fit into 32 bits.
            found[1, here] += self._cache.receipts[int(shard)].first_sequence
        return RowTokens(*found)

    def _shard(self, shard: int) -> NDArray[np.int32]:
        if shard not in self._kept:
            tokens = self._cache.tokens(shard)
            where = tokens.row_sequence, tokens.row_position
            table = np.stack([tokens.tokens[where], *where], axis=1)  # [N, 3]
            while self._kept and self._bytes + table.nbytes > self._limit:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.nbytes
            self._kept[shard] = table
            self._bytes += table.nbytes
        self._kept.move_to_end(shard)
        return self._kept[shard]
