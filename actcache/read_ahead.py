"""Windows of rows, loaded by threads ahead of the batches that are taken from them.

Which thread loads what, and when, cannot touch the order: windows are asked for in the order in
which batches need them, and are handed out in that order, whichever is done first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from actcache.checked_reads import CheckedReads
from actcache.order import Epoch, Rows, Span
from actcache.reader import Cache
from actcache.storage import StoredRows


@dataclass
class Window:
    """A window of one lane, in memory as on disk. W rows at most."""

    rows: Mapping[str, StoredRows]
    """By hookpoint, in the order of the line. Each [W, d_in]"""
    addresses: Rows
    """(shard, row in shard). [W, 2]"""
    lane: int = 0
    start: int = 0
    """First row of the lane that it holds."""
    stop: int = 0
    """First one after them."""
    permutation: Rows | None = None
    """The order in which its rows are taken. [stop - start]"""


class WindowMemory:
    """Memory for windows, used again and again: fresh pages cost as much as filling them."""

    def __init__(self, cache: Cache, hookpoints: Sequence[str]) -> None:
        self._cache, self._hookpoints = cache, tuple(hookpoints)
        self._free: list[Window] = []

    def take(self, rows: int) -> Window:
        """A window with room for so many rows."""
        while self._free:
            window = self._free.pop()
            if len(window.addresses) == rows:
                return window  # those of another plan are let go
        codec, width = self._cache.codec, self._cache.manifest.width
        memory = {name: codec.empty(rows, width(name)) for name in self._hookpoints}
        return Window(memory, np.empty((rows, 2), dtype=np.int64))

    def give_back(self, window: Window) -> None:
        """Its rows are not needed any more."""
        self._free.append(window)


class ReadAhead:
    """The windows of some lanes of an epoch, one after another as batches need them.

    Args:
        reads: how rows are read.
        memory: for the windows.
        threads: load them.
        line: the epoch.
        lanes: which lanes.
        first_step: step of the first batch.
        spare: windows to load ahead while every lane has one.
    """

    def __init__(
        self,
        reads: CheckedReads,
        memory: WindowMemory,
        threads: Executor,
        line: Epoch,
        lanes: Sequence[int],
        first_step: int,
        spare: int,
    ) -> None:
        self._reads, self._memory, self._threads, self._line = reads, memory, threads, line
        self._wanted = _needed(line, lanes, first_step)
        self._loading: deque[Future[Window]] = deque()
        self._capacity = min(line.plan.window, line.plan.lane_rows)
        self._free = len(lanes) + spare  # windows that may still be begun
        self._begin()

    def swap(self, old: Window | None) -> Window:
        """Give a window back, and take the next; raises what its reading raised."""
        if old is not None:
            self._memory.give_back(old)
            self._free += 1
        self._begin()
        return self._loading.popleft().result()

    def end(self, last: Sequence[Window | None]) -> None:
        """Give back all windows that lanes still have."""
        for window in last:
            if window is not None:
                self._memory.give_back(window)

    def _begin(self) -> None:
        while self._free:
            wanted = next(self._wanted, None)
            if wanted is None:
                return
            window = self._memory.take(self._capacity)
            self._loading.append(self._threads.submit(self._load, window, *wanted))
            self._free -= 1

    def _load(self, window: Window, lane: int, number: int) -> Window:
        line = self._line
        window.lane = lane
        window.start, window.stop = line.window(lane, number)
        window.permutation = line.permutation(lane, number)
        first = lane * line.plan.lane_rows
        spans = list(line.spans(first + window.start, first + window.stop))
        self._reads.load(spans, window.rows)
        write_addresses(spans, window.addresses)
        return window


def write_addresses(spans: Sequence[Span], out: Rows) -> None:
    """Write the address of every row of some spans. out [rows or more, 2]"""
    filled = 0
    for span in spans:
        out[filled : filled + span.rows, 0] = span.shard
        out[filled : filled + span.rows, 1] = np.arange(span.start, span.start + span.rows)
        filled += span.rows


def _needed(line: Epoch, lanes: Sequence[int], first_step: int) -> Iterator[tuple[int, int]]:
    """(lane, number of its window), in the order in which batches come to need them."""
    plan, b = line.plan, line.plan.rows_per_lane_and_batch
    held = dict.fromkeys(lanes, first_step * b)  # rows of each lane that are in windows by now
    for step in range(first_step, plan.steps_per_epoch):
        for lane in lanes:
            while held[lane] < (step + 1) * b:
                number = line.window_at(lane, held[lane])
                yield lane, number
                held[lane] = line.window(lane, number)[1]
