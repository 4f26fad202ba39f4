"""Shuffling in memory: windows of rows are loaded into a buffer, and batches are gathered from it.

One array holds all windows, so that one gather collects a batch from all lanes. Threads load the
next windows meanwhile (prefetch). Windows are scheduled and handed out in the order in which
batches need them, so the timing of threads cannot change the order of rows.

Letters: S slots of W rows, L lanes, b rows of a lane in a batch, n rows of a batch.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from actcache.cache.reader import Cache
from actcache.storage import Array, StoredRows
from actcache.stream.order import Epoch, Rows, Span
from actcache.stream.verified_reads import VerifiedReader

if TYPE_CHECKING:
    import torch


M = TypeVar("M")
Load = Callable[[Mapping[str, StoredRows]], None]
"""Reads the rows of a window, by hookpoint, into the given memory."""


@dataclass(frozen=True)
class RawBatch(Generic[M]):
    """Rows of one batch in the type on disk, before they become tensors."""

    step: int
    rows: M
    addresses: Rows
    """(shard, row in shard) of each row. [n, 2]"""


class BufferSlots:
    """Addresses and read order of the rows in a shuffle buffer.

    Args:
        slots: number of windows that the buffer holds.
        capacity: largest number of rows of a window.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.shape = (slots, capacity)
        self.addresses: Rows = np.empty((slots * capacity, 2), dtype=np.int64)
        """(shard, row in shard) of each row. [S * W, 2]"""
        self.order: Rows = np.zeros(slots * capacity, dtype=np.int64)
        """For each slot, the permutation in which its rows are read, as indices into the buffer.
        Unfilled slots hold arbitrary valid indices. [S * W]"""


class ShuffleBuffer(Protocol[M]):
    """Memory for windows, one in each slot, and for batches that are gathered from them."""

    slots: BufferSlots

    def fill(self, position: slice, load: Load) -> None:
        """Load rows into a range of the buffer. Called from several threads."""

    def batch(self, rows: int) -> M:
        """Return memory for a batch of so many rows."""

    def gather(self, chosen: Rows, out: M, at: int) -> None:
        """Copy the rows at some indices of the buffer to a batch, starting at its row `at`."""

    def tensors(self, batch: M) -> dict[str, torch.Tensor]:
        """Convert a batch to tensors by hookpoint. Each [n, d_in]"""


class HostShuffleBuffer:
    """A shuffle buffer in main memory.

    Args:
        cache: source of the rows.
        hookpoints: hookpoints that are read.
        slots: number and capacity of the windows.
        recycled: number of batches whose memory may be used again, see `BatchRecycler`.
    """

    def __init__(
        self, cache: Cache, hookpoints: Sequence[str], slots: BufferSlots, recycled: int
    ) -> None:
        self.slots, self._row_dtype = slots, cache.row_dtype
        widths = {name: cache.manifest.width(name) for name in hookpoints}
        self._batches = BatchRecycler(cache.row_dtype.empty, widths, recycled)
        count, capacity = slots.shape
        self._rows = {
            name: cache.row_dtype.empty(count * capacity, width) for name, width in widths.items()
        }

    def fill(self, position: slice, load: Load) -> None:
        """Read files directly into the buffer."""
        load({name: rows[position] for name, rows in self._rows.items()})

    def batch(self, rows: int) -> dict[str, StoredRows]:
        """Return a recycled batch buffer."""
        return self._batches.take(rows)

    def gather(self, chosen: Rows, out: dict[str, StoredRows], at: int) -> None:
        """Gather in one thread: torch's thread pool would compete with the reading threads."""
        for name, stored in self._rows.items():
            stored.take(chosen, out[name][at : at + len(chosen)])

    def tensors(self, batch: dict[str, StoredRows]) -> dict[str, torch.Tensor]:
        """Wrap the batch's memory as tensors; 8-bit rows are decoded into new memory."""
        return {name: self._row_dtype.to_torch(rows) for name, rows in batch.items()}


class BatchRecycler:
    """Batch buffers that are used again, since fresh pages cost as much as filling them.

    Tensors and views of a batch hold references to its arrays. A buffer is returned again only when
    the reference counts of its arrays are what they were when it was new.

    Args:
        empty: allocates memory for (rows, width).
        widths: width of each hookpoint.
        most: number of buffers that are tracked; older ones are left to the garbage collector.
    """

    def __init__(
        self, empty: Callable[[int, int], StoredRows], widths: dict[str, int], most: int
    ) -> None:
        self._empty, self._widths = empty, widths
        self._kept: deque[tuple[int, dict[str, StoredRows], list[int]]] = deque(maxlen=most)

    def take(self, rows: int) -> dict[str, StoredRows]:
        """Return a recycled batch buffer. It is not reused while the caller holds a reference."""
        for count, batch, free in self._kept:
            if count == rows and _references(batch) == free:
                return _views(batch)
        batch = {name: self._empty(rows, width) for name, width in self._widths.items()}
        self._kept.append((rows, batch, []))
        self._kept[-1][2].extend(_references(batch))
        return _views(batch)


def _views(batch: dict[str, StoredRows]) -> dict[str, StoredRows]:
    """Create views, each of which raises the reference count of the memory below it."""
    return {name: rows[:] for name, rows in batch.items()}


def _references(batch: dict[str, StoredRows]) -> list[int]:
    return [
        sys.getrefcount(_owner(part)) for rows in batch.values() for part in rows.parts.values()
    ]


def _owner(array: Array) -> Array:
    """Return the array that owns the memory: NumPy views refer to it, not to views between."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@dataclass(frozen=True)
class Window:
    """A window of one lane, in a slot of the buffer."""

    slot: int
    lane: int
    number: int
    """Number of the window in its lane."""
    start: int
    """First row of the lane that the window holds."""
    stop: int
    """First row of the lane after the window."""


class WindowLoader:
    """Prefetch of the windows of some lanes of an epoch, in the order in which batches need them.

    Args:
        reader: reads the rows.
        hookpoints: hookpoints that are read.
        buffer: destination of the rows.
        threads: executor that loads windows.
        epoch: the epoch.
        lanes: lanes whose windows are loaded.
        first_step: step of the first batch.
    """

    def __init__(
        self,
        reader: VerifiedReader,
        hookpoints: Sequence[str],
        buffer: ShuffleBuffer[Any],
        threads: Executor,
        epoch: Epoch,
        lanes: Sequence[int],
        first_step: int,
    ) -> None:
        self._hookpoints = hookpoints
        self._reader, self._buffer, self._threads, self._epoch = reader, buffer, threads, epoch
        self._needed = _needed(epoch, lanes, first_step)
        self._loading: deque[Future[Window]] = deque()
        slots, self._capacity = buffer.slots.shape
        self._free = list(range(slots))
        self._schedule()

    def next_window(self, old: Window | None) -> Window:
        """Free the slot of an old window and return the next one; a read error is raised here."""
        if old is not None:
            self._free.append(old.slot)
        self._schedule()
        return self._loading.popleft().result()

    def _schedule(self) -> None:
        """Start loading a window into each free slot."""
        while self._free:
            needed = next(self._needed, None)
            if needed is None:
                return
            lane, number = needed
            start, stop = self._epoch.window(lane, number)
            first = lane * self._epoch.plan.lane_rows
            spans = list(self._epoch.spans(first + start, first + stop))
            self._reader.readahead(spans, self._hookpoints)
            window = Window(self._free.pop(), lane, number, start, stop)
            self._loading.append(self._threads.submit(self._load, window, spans))

    def _load(self, window: Window, spans: Sequence[Span]) -> Window:
        slots, begin = self._buffer.slots, window.slot * self._capacity
        position = slice(begin, begin + window.stop - window.start)
        permutation = self._epoch.permutation(window.lane, window.number)
        np.add(permutation, begin, out=slots.order[position])
        filled = begin
        for span in spans:
            slots.addresses[filled : filled + span.rows, 0] = span.shard
            slots.addresses[filled : filled + span.rows, 1] = span.start + np.arange(span.rows)
            filled += span.rows
        self._buffer.fill(position, lambda memory: self._reader.load(spans, memory))
        return window


def _needed(epoch: Epoch, lanes: Sequence[int], first_step: int) -> Iterator[tuple[int, int]]:
    """Yield (lane, number of its window) in the order in which batches need them."""
    plan, b = epoch.plan, epoch.plan.rows_per_lane_and_batch
    held = dict.fromkeys(lanes, first_step * b)  # rows of each lane that are in windows so far
    for step in range(first_step, plan.steps_per_epoch):
        for lane in lanes:
            while held[lane] < (step + 1) * b:
                number = epoch.window_at(lane, held[lane])
                yield lane, number
                held[lane] = epoch.window(lane, number)[1]


def shuffled_batches(
    loader: WindowLoader,
    buffer: ShuffleBuffer[M],
    epoch: Epoch,
    lanes: Sequence[int],
    first_step: int,
) -> Iterator[RawBatch[M]]:
    """Gather the batches of some lanes of an epoch, starting at a step.

    Args:
        loader: loads the lanes' windows.
        buffer: holds the windows.
        epoch: the epoch.
        lanes: lanes that batches are gathered from.
        first_step: step of the first batch.
    """
    b = epoch.plan.rows_per_lane_and_batch
    windows: list[Window | None] = [None] * len(lanes)
    bounds = np.zeros((3, len(lanes)), dtype=np.int64)  # start, stop, first index in the buffer
    within = np.arange(b)  # [b]
    for step in range(first_step, epoch.plan.steps_per_epoch):
        count = b * len(lanes)
        batch = RawBatch(step, buffer.batch(count), np.empty((count, 2), dtype=np.int64))
        row = step * b
        starts, stops, begins = bounds
        whole = row + b <= stops  # [L]
        if whole.any():
            # Lanes that need another window get arbitrary rows first: one gather is faster.
            first = np.where(whole, begins + row - starts, 0)  # [L]
            _gather(buffer, buffer.slots.order[first[:, None] + within].ravel(), batch, 0)
        for i in np.flatnonzero(~whole):
            windows[i] = _gather_windows(loader, buffer, windows[i], row, b, batch, at=int(i) * b)
            bounds[:, i] = _bounds(buffer, windows[i])
        yield batch


def _gather_windows(
    loader: WindowLoader,
    buffer: ShuffleBuffer[M],
    window: Window | None,
    row: int,
    count: int,
    out: RawBatch[M],
    at: int,
) -> Window | None:
    """Copy rows [row, row + count) of a lane, from several windows, to a batch from row `at` on.

    Returns:
        The last window that was used.
    """
    while count:
        if window is None or row >= window.stop:
            window = loader.next_window(window)
        n = min(count, window.stop - row)
        start, _, begin = _bounds(buffer, window)
        first = begin + row - start
        _gather(buffer, buffer.slots.order[first : first + n], out, at)
        row, count, at = row + n, count - n, at + n
    return window


def _bounds(buffer: ShuffleBuffer[Any], window: Window | None) -> tuple[int, int, int]:
    assert window is not None
    return window.start, window.stop, window.slot * buffer.slots.shape[1]


def _gather(buffer: ShuffleBuffer[M], chosen: Rows, out: RawBatch[M], at: int) -> None:
    """Copy rows of the buffer and their addresses to a batch, starting at its row `at`."""
    buffer.gather(chosen, out.rows, at)
    # mode='clip' lets NumPy write straight to `out`; the indices are in range.
    position = slice(at, at + len(chosen))
    np.take(buffer.slots.addresses, chosen, axis=0, out=out.addresses[position], mode="clip")
