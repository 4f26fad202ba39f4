"""Memory for batches, used again once nobody holds what was in it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable

import numpy as np

from actcache.storage import Array, StoredRows

Empty = Callable[[int, int], StoredRows]


class BatchMemory:
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
