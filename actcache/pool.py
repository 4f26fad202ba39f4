"""Where windows and batches lie while rows are mixed: in main memory, see also `device_pool`.

One piece of memory holds all windows, so that a batch is gathered out of all lanes at once.
Letters: S slots of W rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from actcache.batch_memory import BatchMemory
from actcache.order import Rows
from actcache.reader import Cache
from actcache.storage import StoredRows

if TYPE_CHECKING:
    import torch

M = TypeVar("M")
Load = Callable[[Mapping[str, StoredRows]], None]
"""Reads a window's rows, by hookpoint, into memory for them."""


@dataclass(frozen=True)
class Filled(Generic[M]):
    """Rows of one batch, as on disk."""

    step: int
    rows: M
    addresses: Rows
    """(shard, row in shard) of each. [n, 2]"""


class Places:
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


class Pool(Protocol[M]):
    """Memory for windows, of which each has a slot, used again and again; and for batches."""

    places: Places

    def fill(self, place: slice, load: Load) -> None:
        """Have rows read into a part of the pool. Called from several threads."""

    def batch(self, rows: int) -> M:
        """Memory for a batch."""

    def gather(self, chosen: Rows, out: M, at: int) -> None:
        """Copy rows of the pool, by their numbers, to a batch, from row `at` on."""

    def tensors(self, batch: M) -> dict[str, torch.Tensor]:
        """A batch as it is handed out. By hookpoint, each [n, d_in]"""


class HostPool:
    """A pool in main memory.

    Args:
        cache: where the rows come from.
        hookpoints: which rows.
        places: for how many.
        batches: memory for batches.
    """

    def __init__(
        self, cache: Cache, hookpoints: Sequence[str], places: Places, batches: BatchMemory
    ) -> None:
        self.places, self._codec, self._batches = places, cache.codec, batches
        slots, capacity = places.shape
        self._rows = {
            name: cache.codec.empty(slots * capacity, cache.manifest.width(name))
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
