"""Windows of rows, loaded by threads ahead of the batches that are taken from them.

Which thread loads what, and when, cannot touch the order: windows are asked for in the order in
which batches need them, and are handed out in that order, whichever is done first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from actcache.stream.order import Epoch, Rows, Span
from actcache.stream.shuffle_buffer import ShuffleBuffer
from actcache.stream.verified_reads import VerifiedReader


@dataclass(frozen=True)
class Window:
    """A window of one lane in a slot of the pool."""

    slot: int
    lane: int
    number: int
    """In its lane."""
    start: int
    """First row of the lane that it holds."""
    stop: int
    """First one after them."""


class WindowLoader:
    """The windows of some lanes of an epoch, one after another as batches need them.

    Args:
        reads: how rows are read.
        hookpoints: which rows.
        pool: where they are put.
        threads: load them.
        line: the epoch.
        lanes: which lanes.
        first_step: step of the first batch.
    """

    def __init__(
        self,
        reads: VerifiedReader,
        hookpoints: Sequence[str],
        pool: ShuffleBuffer[Any],
        threads: Executor,
        line: Epoch,
        lanes: Sequence[int],
        first_step: int,
    ) -> None:
        self._hookpoints = hookpoints
        self._reads, self._pool, self._threads, self._line = reads, pool, threads, line
        self._wanted = _needed(line, lanes, first_step)
        self._loading: deque[Future[Window]] = deque()
        slots, self._capacity = pool.places.shape
        self._free = list(range(slots))
        self._begin()

    def next_window(self, old: Window | None) -> Window:
        """Give a window back, and take the next; raises what its reading raised."""
        if old is not None:
            self._free.append(old.slot)
        self._begin()
        return self._loading.popleft().result()

    def _begin(self) -> None:
        while self._free:
            wanted = next(self._wanted, None)
            if wanted is None:
                return
            lane, number = wanted
            start, stop = self._line.window(lane, number)
            first = lane * self._line.plan.lane_rows
            spans = list(self._line.spans(first + start, first + stop))
            self._reads.readahead(spans, self._hookpoints)
            window = Window(self._free.pop(), lane, number, start, stop)
            self._loading.append(self._threads.submit(self._load, window, spans))

    def _load(self, window: Window, spans: Sequence[Span]) -> Window:
        places, begin = self._pool.places, window.slot * self._capacity
        place = slice(begin, begin + window.stop - window.start)
        permutation = self._line.permutation(window.lane, window.number)
        np.add(permutation, begin, out=places.order[place])
        write_addresses(spans, places.addresses[place])
        self._pool.fill(place, lambda memory: self._reads.load(spans, memory))
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
