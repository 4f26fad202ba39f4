"""Where windows and batches lie while rows are mixed: in main memory, see also `device_pool`.

One piece of memory holds all windows, so that a batch is gathered out of all lanes at once.
Letters: S slots of W rows.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from actcache.cache.reader import Cache
from actcache.storage import Array, StoredRows
from actcache.stream.order import Rows

if TYPE_CHECKING:
    import torch


M = TypeVar("M")
Load = Callable[[Mapping[str, StoredRows]], None]
"""Reads a window's rows, by hookpoint, into memory for them."""


@dataclass(frozen=True)
class RawBatch(Generic[M]):
    """Rows of one batch, as on disk."""

    step: int
    rows: M
    addresses: Rows
    """(shard, row in shard) of each. [n, 2]"""


class BufferSlots:
    """What is known of the rows in a pool.

    Args:
        slots: windows that it holds.
        capacity: rows of a window, at most.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.shape = (slots, capacity)
        self.addresses: Rows = np.empty((slots * capacity, 2), dtype=np.int64)
        """(shard, row in shard) of each. [S * W, 2]"""
        self.order: Rows = np.zeros(slots * capacity, dtype=np.int64)
        """Numbers of a window's rows in this pool, in the order in which they are taken; of a slot
        that is not filled yet, some row's. [S * W]"""


class ShuffleBuffer(Protocol[M]):
    """Memory for windows, of which each has a slot, used again and again; and for batches."""

    places: BufferSlots

    def fill(self, place: slice, load: Load) -> None:
        """Have rows read into a part of the pool. Called from several threads."""

    def batch(self, rows: int) -> M:
        """Memory for a batch."""

    def gather(self, chosen: Rows, out: M, at: int) -> None:
        """Copy rows of the pool, by their numbers, to a batch, from row `at` on."""

    def tensors(self, batch: M) -> dict[str, torch.Tensor]:
        """A batch as it is handed out. By hookpoint, each [n, d_in]"""


class HostShuffleBuffer:
    """A pool in main memory.

    Args:
        cache: where the rows come from.
        hookpoints: which rows.
        places: for how many.
        batches: memory for batches.
    """

    def __init__(
        self, cache: Cache, hookpoints: Sequence[str], places: BufferSlots, batches: BatchRecycler
    ) -> None:
        self.places, self._codec, self._batches = places, cache.row_dtype, batches
        slots, capacity = places.shape
        self._rows = {
            name: cache.row_dtype.empty(slots * capacity, cache.manifest.width(name))
            for name in hookpoints
        }

    def fill(self, place: slice, load: Load) -> None:
        """Read straight into the pool."""
        load({name: rows[place] for name, rows in self._rows.items()})

    def batch(self, rows: int) -> dict[str, StoredRows]:
        """Memory that nobody holds any more."""
        return self._batches.take(rows)

    def gather(self, chosen: Rows, out: dict[str, StoredRows], at: int) -> None:
        """In one thread: torch's would collapse beside those that read."""
        for name, stored in self._rows.items():
            stored.take(chosen, out[name][at : at + len(chosen)])

    def tensors(self, batch: dict[str, StoredRows]) -> dict[str, torch.Tensor]:
        """In the batch's memory, but for 8-bit rows, which are decoded."""
        return {name: self._codec.to_torch(rows) for name, rows in batch.items()}


Empty = Callable[[int, int], StoredRows]


class BatchRecycler:
    """Rows for a stream's batches: fresh pages for every batch would cost as much as filling them.

    A batch is whoever's took it, for as long as it is held: tensors and views of it count in the
    reference count of the array below, and only memory that is held by nobody else is used again.

    Args:
        empty: gives memory for so many rows of a width.
        widths: of the hookpoints, by name.
        most: batches to keep an eye on; of more, the oldest is left to whoever holds it.
    """

    def __init__(self, empty: Empty, widths: dict[str, int], most: int) -> None:
        self._empty, self._widths = empty, widths
        self._kept: deque[tuple[int, dict[str, StoredRows], list[int]]] = deque(maxlen=most)

    def take(self, rows: int) -> dict[str, StoredRows]:
        """Memory for so many rows of every hookpoint, whose it is while what is returned lives."""
        for count, batch, free in self._kept:
            if count == rows and _references(batch) == free:
                return _lent(batch)
        batch = {name: self._empty(rows, width) for name, width in self._widths.items()}
        self._kept.append((rows, batch, []))
        self._kept[-1][2].extend(_references(batch))
        return _lent(batch)


def _lent(batch: dict[str, StoredRows]) -> dict[str, StoredRows]:
    """Views, which count as references to the memory."""
    return {name: rows[:] for name, rows in batch.items()}


def _references(batch: dict[str, StoredRows]) -> list[int]:
    return [
        sys.getrefcount(_owner(part)) for rows in batch.values() for part in rows.parts.values()
    ]


def _owner(array: Array) -> Array:
    """The array that holds the memory: every view refers to it, and not to a view between."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
